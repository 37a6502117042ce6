"""The benchmark of the ops: everything that is timed was found right, and what is wrong is not timed."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE
from transmamba.benchmarking import OpShape, OpsOptions, measure_ops
from transmamba.benchmarking import ops as module
from transmamba.benchmarking.ops import BOUNDS, Exact, floors_of, inputs_of
from transmamba.benchmarking.timing import compute_dtype
from transmamba.errors import InputError
from transmamba.ops import hybrid_mixer, ssd_scan

TINY = OpsOptions(shapes="3x80x4/2x16", hybrid="1x96x2x16", points="0,20,96", seconds=0.01)
BOUND = BOUNDS[compute_dtype(DEVICE)]


def mix(point: int, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
    return hybrid_mixer(q, k, v, dt, A, D, trans_point=point)


def test_a_whole_run_at_tiny_size() -> None:
    lines: list[str] = []
    result = measure_ops(DEVICE, TINY, show=lines.append)
    assert not result.failures
    kinds = {(row.kind, row.passes) for row in result.rows}
    pairs = {(kind, passes) for kind in ("ssd_scan", "attention", "hybrid") for passes in ("forward", "both")}
    assert pairs | {("memory_converter", "forward")} <= kinds
    assert all(row.timing.median > 0 and row.error < BOUND for row in result.rows)
    hybrid = result.hybrid
    assert hybrid["points"] == [0, 20, 96]
    assert hybrid["mean"]["hybrid"] == pytest.approx(sum(hybrid["milliseconds"]["hybrid"]) / 3)
    assert hybrid["milliseconds"]["attention on the prefix"][0] == hybrid["milliseconds"]["Memory Converter"][0] == 0
    assert 0 < hybrid["converter_share"] < 1
    assert any("TransPoint 20" in line for line in lines)
    assert result.to_json()["rows"][0]["timing"]["runs"] >= 5


def test_what_is_wrong_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*inputs: Tensor, **options: Any) -> Tensor:
        q, k, v, dt, A, D = inputs
        return ssd_scan(q, k, v, dt, 1.01 * A, D, **options)

    monkeypatch.setattr(module, "_scan", lambda backend, *inputs: wrong(*inputs))
    result = measure_ops(DEVICE, TINY)
    assert any("ssd_scan" in line and "not timed" in line for line in result.failures)
    assert not any(row.kind == "ssd_scan" for row in result.rows)
    assert any(row.kind == "attention" for row in result.rows)


def test_what_cannot_be_checked_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*inputs: Any, **options: Any) -> Exact:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "Exact", exhausted)
    result = measure_ops(DEVICE, OpsOptions(shapes="1x40x2x16", hybrid="", points="", seconds=0.01))
    assert not result.failures
    assert any("cannot be checked" in line for line in result.left_out)
    assert {row.kind for row in result.rows} == {"memory_converter"}


@pytest.mark.parametrize("point", [0, 30, 100])
def test_the_check_sees_every_tensor(point: int) -> None:
    """One gradient after the other is off by a fiftieth; so are the outputs."""
    shape = OpShape(batch=2, seq_len=100, heads=2, kv_heads=2, size=16)
    inputs = inputs_of(shape, DEVICE)
    exact = Exact(inputs, point=point)
    right = exact.errors_of(partial(mix, point), inputs)
    assert max(right.values()) < BOUND
    names = [f"gradient of {name}" for name in inputs if not (point == 100 and name in ("dt", "A", "D"))]
    for name in ["y", *names]:

        class Off(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
                ctx.factor = factor
                return x.clone()

            @staticmethod
            def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
                return ctx.factor * dx, None

        def call(*values: Tensor, name: str = name, off: Any = Off) -> Tensor:
            changed = [
                off.apply(x, 1.02 if name == f"gradient of {of}" else 1.0) for of, x in zip(inputs, values, strict=True)
            ]
            y = mix(point, *changed)
            return y * 1.02 if name == "y" else y

        errors = exact.errors_of(call, inputs)
        assert errors[name] > BOUND or (name == "gradient of A" and errors[name] > 10 * right[name]), name


def test_floors_count_the_suffix_and_the_causal_pairs() -> None:
    shape = OpShape(batch=2, seq_len=128, heads=4, kv_heads=2, size=16)
    (moved, moved_both), (scan, scan_both) = floors_of(shape, 0, torch.bfloat16)
    tokens = 2 * 128
    wide, narrow = (2 * tokens * 16 * heads for heads in (4, 2))
    assert moved == (wide + 2 * narrow) + wide  # q, k, v; y
    assert moved_both == moved + (wide + 2 * narrow + wide) + (wide + 2 * narrow)  # q, k, v, dy; dq, dk, dv
    assert scan == tokens * 4 * (2 * 2 * 64 * 16 + 2 * 2 * 16 * 16)
    assert scan_both == 3.5 * scan
    attention = floors_of(shape, 128, torch.bfloat16)[1][0]
    assert attention == 2 * 4 * (128 * 129 / 2) * 4 * 16


@pytest.mark.parametrize("text", ["", "8x8192", "8x8192x16xbig", "0x1x1x1", "1x8x4/3x16"])
def test_a_shape_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="shape"):
        OpShape.parse(text)


def test_points_beyond_the_sequence_are_refused() -> None:
    with pytest.raises(InputError, match="from 0 to the 96"):
        measure_ops(DEVICE, OpsOptions(shapes="", hybrid="1x96x2x16", points="0,97"))
