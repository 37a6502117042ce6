"""Times are those of the call, floors follow from rates, and a result says where it comes from."""

import time

import pytest
import torch

from transmamba.benchmarking import Rates, Timing, measure_rates, provenance, time_call

CPU = torch.device("cpu")


def test_a_call_takes_as_long_as_it_sleeps() -> None:
    timing = time_call(lambda: time.sleep(0.004), CPU, seconds=0.05)
    assert 4.0 <= timing.quartiles[0] <= timing.median <= timing.quartiles[1]
    assert timing.runs >= 5
    assert timing.host < timing.median  # sleeping costs no processor


def test_a_slow_call_is_still_run_five_times() -> None:
    calls: list[int] = []
    timing = time_call(lambda: calls.append(1), CPU, seconds=0.0, warm_ups=3)
    assert timing.runs == 5
    assert len(calls) == 8


def test_one_slow_run_moves_the_quartile_and_not_the_median() -> None:
    timing = Timing.of([1.0, 1.0, 1.0, 9.0, 1.0], [0.5] * 5)
    assert timing.median == 1.0
    assert timing.quartiles[1] > 1.0


def test_floors_are_bytes_and_operations_over_rates() -> None:
    rates = Rates(copy_bytes=4e12, matrix_operations=5e14)
    assert rates.floor_ms(4e9, 1e12) == pytest.approx((1.0, 2.0))


def test_rates_of_this_machine_are_plausible() -> None:
    rates = measure_rates(CPU, seconds=0.02)
    assert 1e8 < rates.copy_bytes < 1e13
    assert 1e8 < rates.matrix_operations < 1e15


def test_a_result_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    found = provenance(CPU, "transmamba bench ops")
    assert found["versions"]["torch"] == "2.11.0+cu130"
    assert found["device"]
    assert found["command"] == "transmamba bench ops"


@pytest.mark.gpu
def test_a_wait_for_the_processor_is_not_time_of_the_device() -> None:
    device = torch.device("cuda")
    x = torch.zeros(1024, device=device)

    def call() -> None:
        time.sleep(0.003)
        x.add_(1)

    timing = time_call(call, device, seconds=0.2)
    assert timing.host >= 3.0
    assert timing.median < 1.5
