"""ssd_scan: the recurrence in every layout, its gradients, its rounding; and that a wrong recurrence would be seen."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import relative_rms_error
from tests.ops.cases import (
    BORDERS,
    CHUNK,
    FAULT_FACTOR,
    FP64_BOUND,
    HEADS,
    LENGTHS,
    SHARED_HEADS,
    fp32_bound,
    gradients,
    in_double,
    long_inputs,
    rounding,
    ssd_inputs,
    worst_error,
)
from tests.ops.oracle import FAULTS, oracle_scan
from transmamba.ops import ssd_scan
from transmamba.ops.ssd_scan import ssd_scan_reference, ssd_scan_torch
from transmamba.ops.ssd_scan.torch import SMALL_CHUNK_SIZE

BACKENDS = ("reference", "torch")
scan = partial(ssd_scan, return_final_state=True)


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_length_and_head_count_equals_the_matrix(heads: tuple[int, int, int, int], seq_len: int) -> None:
    inputs = ssd_inputs(heads, seq_len=seq_len)
    exact = oracle_scan(**inputs)
    for backend in BACKENDS:
        assert worst_error(scan(**inputs, backend=backend), exact) < FP64_BOUND


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_packed_documents_equal_separate_ones(heads: tuple[int, int, int, int], borders: list[int]) -> None:
    rows = len(borders) - 1
    inputs = ssd_inputs(heads, batch=1, seq_len=borders[-1], rows=rows)
    exact = oracle_scan(**inputs, cu_seqlens=borders)
    for backend in BACKENDS:
        assert worst_error(scan(**inputs, cu_seqlens=borders, backend=backend), exact) < FP64_BOUND
    as_tensor = scan(**inputs, cu_seqlens=torch.tensor(borders, dtype=torch.int32))
    assert worst_error(as_tensor, exact) < FP64_BOUND


@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("skip", [False, True], ids=["no D", "D"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_inputs_may_be_absent(backend: str, packed: bool, skip: bool, state: bool) -> None:
    borders = BORDERS["uneven"] if packed else None
    shape = {"batch": 1, "seq_len": borders[-1], "rows": len(borders) - 1} if borders else {"seq_len": CHUNK + 3}
    inputs = ssd_inputs((8, 2, 2, 8), **shape, skip=skip, state=state)
    exact = oracle_scan(**inputs, cu_seqlens=borders)
    options = {"cu_seqlens": borders, "backend": backend}
    assert worst_error(ssd_scan(**inputs, **options, return_final_state=True), exact) < FP64_BOUND
    assert relative_rms_error(ssd_scan(**inputs, **options), exact[0]) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_an_empty_batch_gives_an_empty_output(heads: tuple[int, int, int, int], backend: str) -> None:
    y, state = scan(**ssd_inputs(heads, batch=0, seq_len=5), backend=backend)
    assert y.shape == (0, 5, max(heads), 5)
    assert state.shape == (0, max(heads[1:]), 6, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_tokens_the_state_stays(backend: str) -> None:
    inputs = ssd_inputs(seq_len=0)
    y, state = scan(**inputs, backend=backend)
    assert y.shape == (2, 0, 4, 5)
    assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("cut", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_cut_anywhere_equals_the_whole(backend: str, cut: int) -> None:
    inputs = ssd_inputs((8, 2, 2, 8), seq_len=2 * CHUNK + 5)
    before = inputs | {name: inputs[name][:, :cut] for name in ("q", "k", "v", "dt")}
    y_before, state = scan(**before, backend=backend)
    after = inputs | {name: inputs[name][:, cut:] for name in ("q", "k", "v", "dt")} | {"initial_state": state}
    y_after, state = scan(**after, backend=backend)
    whole = scan(**inputs, backend=backend)
    assert worst_error((torch.cat([y_before, y_after], dim=1), state), whole) < FP64_BOUND


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 16, 64, 1000])
def test_chunk_size_does_not_change_the_result(chunk_size: int) -> None:
    inputs = ssd_inputs(seq_len=37)
    assert worst_error(ssd_scan_torch(**inputs, chunk_size=chunk_size), oracle_scan(**inputs)) < FP64_BOUND


@pytest.mark.parametrize("state_size", [1, 2, 130])
def test_state_size_and_head_dim_are_independent(state_size: int) -> None:
    inputs = ssd_inputs((2, 2, 6, 6), seq_len=3 * CHUNK, state_size=state_size, head_dim=33)
    assert worst_error(scan(**inputs), oracle_scan(**inputs)) < FP64_BOUND


def test_strided_inputs_are_read_in_place() -> None:
    inputs = ssd_inputs(seq_len=CHUNK + 3)
    strided = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v", "dt")}
    assert not strided["q"].is_contiguous()
    assert worst_error(scan(**(inputs | strided)), oracle_scan(**inputs)) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_modified(backend: str) -> None:
    inputs = ssd_inputs(seq_len=CHUNK + 3)
    kept = {name: x.clone() for name, x in inputs.items()}
    scan(**inputs, backend=backend)
    assert all(torch.equal(inputs[name], kept[name]) for name in inputs)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("heads", [(2, 1, 2, 2), (1, 2, 1, 1), (2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("implementation", [ssd_scan_reference, partial(ssd_scan_torch, chunk_size=2)], ids=BACKENDS)
def test_gradients_are_those_of_finite_differences(
    implementation: Any, heads: tuple[int, int, int, int], packed: bool
) -> None:
    borders = [0, 1, 1, 5] if packed else None
    shape = {"batch": 1, "rows": 3} if packed else {"batch": 2}
    inputs = ssd_inputs(heads, **shape, seq_len=5, state_size=2, head_dim=2, device="cpu", requires_grad=True)

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor]:
        return implementation(**dict(zip(inputs, values, strict=True)), cu_seqlens=borders)

    assert torch.autograd.gradcheck(outputs, tuple(inputs.values()))


@pytest.mark.parametrize("borders", [None, BORDERS["uneven"]], ids=["dense", "packed"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_gradients_equal_those_of_the_matrix(heads: tuple[int, int, int, int], borders: list[int] | None) -> None:
    shape = {"batch": 1, "seq_len": borders[-1], "rows": len(borders) - 1} if borders else {"seq_len": 2 * CHUNK + 7}
    inputs = ssd_inputs(heads, **shape)
    exact = gradients(oracle_scan, inputs, cu_seqlens=borders)
    assert worst_error(gradients(scan, inputs, cu_seqlens=borders), exact) < FP64_BOUND


def test_reference_gradients_equal_those_of_the_matrix() -> None:
    inputs = ssd_inputs((8, 2, 2, 8), seq_len=CHUNK + 1)
    exact = gradients(oracle_scan, inputs)
    assert worst_error(gradients(scan, inputs, backend="reference"), exact) < FP64_BOUND


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_fp32_errs_by_rounding_only(heads: tuple[int, int, int, int]) -> None:
    inputs = ssd_inputs(heads, seq_len=5 * CHUNK + 3, dtype=torch.float32)
    exact = oracle_scan(**in_double(inputs))
    bound = fp32_bound(inputs)
    for backend in BACKENDS:
        assert worst_error(scan(**inputs, backend=backend), exact) < bound
    assert worst_error(gradients(scan, inputs), gradients(oracle_scan, in_double(inputs))) < 4 * bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits_round_the_output_once(backend: str, dtype: torch.dtype) -> None:
    inputs = ssd_inputs((8, 2, 2, 8), seq_len=3 * CHUNK + 5, dtype=dtype)
    y, state = scan(**inputs, backend=backend)
    exact_y, exact_state = oracle_scan(**in_double(inputs))
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert relative_rms_error(y, exact_y) < rounding(dtype) + fp32_bound(inputs)
    assert relative_rms_error(state, exact_state) < fp32_bound(inputs)


def test_sixteen_bit_gradients_round_at_most_three_times() -> None:
    inputs = ssd_inputs((8, 2, 2, 8), seq_len=3 * CHUNK + 5, dtype=torch.bfloat16)
    exact = gradients(oracle_scan, in_double(inputs))
    # v is read twice (D and the state): each gradient is rounded, and then their sum.
    found = gradients(scan, inputs, backend="torch")
    assert worst_error(found, exact) < 3 * rounding(torch.bfloat16) + 4 * fp32_bound(inputs)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_bound_would_show_a_wrong_recurrence(fault: str) -> None:
    for heads in SHARED_HEADS.values():
        inputs = ssd_inputs(heads, seq_len=3 * SMALL_CHUNK_SIZE + 5)  # a fault at a row's ends is small in a long one
        exact, wrong = oracle_scan(**inputs), oracle_scan(**inputs, fault=fault)
        loosest = rounding(torch.bfloat16) + fp32_bound(inputs)
        assert relative_rms_error(wrong[0], exact[0]) > FAULT_FACTOR * loosest
        gradient_errors = [
            relative_rms_error(w, e)
            for w, e in zip(gradients(oracle_scan, inputs, fault=fault), gradients(oracle_scan, inputs), strict=True)
        ]
        assert max(gradient_errors) > FAULT_FACTOR * (3 * rounding(torch.bfloat16) + 4 * fp32_bound(inputs))


@pytest.mark.parametrize("fault", ["no decay", "no dt", "index shifted"])
def test_the_state_would_show_a_wrong_recurrence(fault: str) -> None:
    inputs = ssd_inputs(seq_len=3 * CHUNK + 5)
    exact, wrong = oracle_scan(**inputs), oracle_scan(**inputs, fault=fault)
    assert relative_rms_error(wrong[1], exact[1]) > FAULT_FACTOR * fp32_bound(inputs)


def test_long_sums_do_not_drift() -> None:
    inputs = long_inputs(20_000)
    y, state = scan(**inputs)
    exact_y, exact_state = scan(**in_double(inputs))
    bound = fp32_bound(inputs)
    for head in range(3):
        assert relative_rms_error(y[:, :, head], exact_y[:, :, head]) < bound
        assert relative_rms_error(state[:, head], exact_state[:, head]) < bound


def test_the_long_bound_would_show_one_running_sum_over_the_row() -> None:
    inputs = {name: None if x is None else x.cpu() for name, x in long_inputs(20_000).items()}  # GPUs add in parts
    errors = []
    for length in range(19_600, 20_001, 100):  # of the last tokens' sums, which alone count, some may round to the good
        given = {name: x[:, :length] if name in ("q", "k", "v", "dt") else x for name, x in inputs.items()}
        k, v, dt, A = (given[name] for name in ("k", "v", "dt", "A"))
        S = (dt * A).cumsum(1)
        naive = torch.einsum("bth,bthn,bthp->bhnp", dt * torch.exp(S[:, -1:] - S), k, v)
        _, exact = scan(**in_double(given))
        errors.append(relative_rms_error(naive[:, 0], exact[:, 0]))
    assert max(errors) > 5 * fp32_bound(inputs)


def test_a_reset_token_forgets_and_does_not_overflow() -> None:
    inputs = ssd_inputs(seq_len=CHUNK, state=False)
    inputs["dt"] = inputs["dt"].clone()
    inputs["dt"][:, 5] = 1e4  # exp(-1e4) is 0 and exp(+1e4) would be infinite
    assert worst_error(scan(**inputs), oracle_scan(**inputs)) < FP64_BOUND
    for x in gradients(scan, inputs):
        assert torch.isfinite(x).all()


def test_dt_of_zero_passes_a_token_by() -> None:
    inputs = ssd_inputs(seq_len=9, skip=False)
    inputs["dt"] = torch.zeros_like(inputs["dt"])
    y, state = scan(**inputs)
    assert torch.equal(state, inputs["initial_state"])
    assert relative_rms_error(y, torch.einsum("bthn,bhnp->bthp", inputs["q"], state)) < FP64_BOUND


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_layout_gives_what_the_reference_gives(data: st.DataObject) -> None:
    state_heads = data.draw(st.integers(1, 6), label="state heads")
    divisors = [n for n in range(1, state_heads + 1) if state_heads % n == 0]
    counts = [data.draw(st.sampled_from(divisors)) for _ in range(3)]
    counts[data.draw(st.integers(0, 2))] = state_heads
    q_heads = data.draw(st.sampled_from([*divisors, 2 * state_heads, 3 * state_heads]), label="q heads")
    packed = data.draw(st.booleans(), label="packed")
    lengths = data.draw(st.lists(st.integers(0, 2 * CHUNK + 2), min_size=1, max_size=5 if packed else 1))
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)] if packed else None
    inputs = ssd_inputs(
        (q_heads, *counts),
        batch=1 if packed else data.draw(st.integers(0, 3), label="batch"),
        seq_len=sum(lengths),
        rows=len(lengths) if packed else None,
        state_size=data.draw(st.integers(1, 9), label="state size"),
        head_dim=data.draw(st.integers(1, 9), label="head dim"),
        skip=data.draw(st.booleans(), label="D"),
        state=data.draw(st.booleans(), label="state"),
    )
    exact = scan(**inputs, cu_seqlens=borders, backend="reference")
    assert worst_error(scan(**inputs, cu_seqlens=borders, backend="torch"), exact) < FP64_BOUND
