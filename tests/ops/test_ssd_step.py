"""ssd_step: one token of ssd_scan, in every head count."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import relative_rms_error
from tests.ops.cases import (
    FAULT_FACTOR,
    FP64_BOUND,
    HEADS,
    SHARED_HEADS,
    Inputs,
    fp32_bound,
    gradients,
    in_double,
    rounding,
    ssd_inputs,
    worst_error,
)
from tests.ops.kernels import needs_triton
from tests.ops.oracle import FAULTS, oracle_scan
from transmamba.errors import InputError
from transmamba.ops import ssd_scan, ssd_step
from transmamba.ops.ssd_step import ssd_step_reference, ssd_step_torch

BACKENDS = ("reference", "torch")
ALL_BACKENDS = [*BACKENDS, pytest.param("triton", marks=needs_triton)]


def step_inputs(sequence: Inputs, t: int = 0) -> Inputs:
    """The token t of ssd_scan's inputs, as ssd_step's."""
    token = {name: sequence[name][:, t] for name in ("q", "k", "v", "dt")}
    return {"state": sequence["initial_state"], **token, "A": sequence["A"], "D": sequence["D"]}


def oracle_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor | None, **fault: Any):
    y, state = oracle_scan(*(x.unsqueeze(1) for x in (q, k, v, dt)), A, D, initial_state=state, **fault)
    return y.squeeze(1), state


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("skip", [False, True], ids=["no D", "D"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_one_token_of_the_scan(backend: str, heads: tuple[int, ...], skip: bool, batch: int) -> None:
    inputs = step_inputs(ssd_inputs(heads, batch=batch, seq_len=1, skip=skip))
    assert worst_error(ssd_step(**inputs, backend=backend), oracle_step(**inputs)) < FP64_BOUND


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_step_after_step_equals_the_scan(backend: str, heads: tuple[int, ...]) -> None:
    sequence = ssd_inputs(heads, seq_len=13)
    state, outputs = sequence["initial_state"], []
    for t in range(13):
        y, state = ssd_step(**(step_inputs(sequence, t) | {"state": state}), backend=backend)
        outputs.append(y)
    whole = ssd_scan(**sequence, return_final_state=True)
    assert worst_error((torch.stack(outputs, dim=1), state), whole) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_given_state_is_not_modified(backend: str) -> None:
    inputs = step_inputs(ssd_inputs(seq_len=1))
    kept = inputs["state"].clone()
    _, state = ssd_step(**inputs, backend=backend)
    assert torch.equal(inputs["state"], kept)
    assert not torch.equal(state, kept)


@pytest.mark.parametrize("heads", [(2, 1, 2, 2), (1, 2, 1, 1), (2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("implementation", [ssd_step_reference, ssd_step_torch], ids=BACKENDS)
def test_gradients_are_those_of_finite_differences(implementation: Any, heads: tuple[int, ...]) -> None:
    inputs = step_inputs(ssd_inputs(heads, seq_len=1, state_size=3, head_dim=2, device="cpu"))
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(implementation, leaves)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_those_of_the_matrix(backend: str, heads: tuple[int, ...]) -> None:
    inputs = step_inputs(ssd_inputs(heads, seq_len=1))
    assert worst_error(gradients(ssd_step, inputs, backend=backend), gradients(oracle_step, inputs)) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_inputs_round_the_output_once_and_the_state_never(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        sequence = ssd_inputs((8, 2, 2, 8), seq_len=1, dtype=dtype)
        inputs, bound = step_inputs(sequence), fp32_bound(sequence)
        y, state = ssd_step(**inputs, backend=backend)
        exact_y, exact_state = oracle_step(**in_double(inputs))
        assert (y.dtype, state.dtype) == (dtype, torch.float32)
        assert relative_rms_error(y, exact_y) < rounding(dtype) + bound
        assert relative_rms_error(state, exact_state) < bound


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "index shifted"])
def test_the_bounds_would_show_a_wrong_step(fault: str) -> None:
    for heads in SHARED_HEADS.values():
        sequence = ssd_inputs(heads, seq_len=1)
        inputs = step_inputs(sequence)
        y, _ = oracle_step(**inputs)
        wrong, _ = oracle_step(**inputs, fault=fault)
        assert relative_rms_error(wrong, y) > FAULT_FACTOR * (rounding(torch.bfloat16) + fp32_bound(sequence))


def test_repeated_bf16_steps_keep_the_state_in_fp32() -> None:
    sequence = ssd_inputs((4, 4, 4, 4), seq_len=200, skip=False, dtype=torch.bfloat16)
    exact = oracle_scan(**in_double(sequence))[1]
    state = rounded = sequence["initial_state"]
    for t in range(200):
        _, state = ssd_step(**(step_inputs(sequence, t) | {"state": state}))
        _, rounded = ssd_step(**(step_inputs(sequence, t) | {"state": rounded.bfloat16()}))
    assert relative_rms_error(state, exact) < fp32_bound(sequence, chunk=1)
    assert relative_rms_error(rounded, exact) > FAULT_FACTOR * fp32_bound(sequence, chunk=1)


@needs_triton
@pytest.mark.parametrize("skip", [False, True], ids=["no D", "D"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_the_kernel_agrees_in_every_head_count(heads: tuple[int, ...], skip: bool) -> None:
    for batch, sizes in ((0, (6, 5)), (1, (1, 1)), (3, (6, 5)), (2, (37, 33)), (2, (16, 96))):
        shape = {"state_size": sizes[0], "head_dim": sizes[1]}
        sequence = ssd_inputs(heads, batch=batch, seq_len=1, skip=skip, dtype=torch.float32, **shape)
        inputs = step_inputs(sequence)
        found = ssd_step(**inputs, backend="triton")
        cancels = 8 if sizes == (1, 1) else 2  # terms of a single number may cancel, those of many do on average
        assert worst_error(found, oracle_step(**in_double(inputs))) < cancels * fp32_bound(sequence)


@needs_triton
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_gradients_of_the_kernel_are_those_of_the_plain_form(heads: tuple[int, ...]) -> None:
    sequence = ssd_inputs(heads, seq_len=1, dtype=torch.float32)
    inputs = step_inputs(sequence)
    found = gradients(ssd_step, inputs, backend="triton")
    assert worst_error(found, gradients(oracle_step, in_double(inputs))) < 8 * fp32_bound(sequence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_in_place_the_state_is_written_where_it_lies(backend: str, dtype: torch.dtype) -> None:
    sequence = ssd_inputs((8, 2, 2, 8), seq_len=9, dtype=dtype, state_size=40, head_dim=70)
    state = sequence["initial_state"].float().clone()
    kept, outputs = state, []
    with torch.no_grad():
        for t in range(9):
            inputs = step_inputs(sequence, t) | {"state": state}
            y, state = ssd_step(**inputs, in_place=True, backend=backend)
            assert state is kept
            outputs.append(y)
    exact_y, exact_state = oracle_scan(**in_double(sequence))
    assert relative_rms_error(state, exact_state) < 2 * fp32_bound(sequence)
    # The interpreter cuts bf16 off on a store, where a card rounds.
    assert relative_rms_error(torch.stack(outputs, dim=1), exact_y) < 2 * rounding(dtype) + 2 * fp32_bound(sequence)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_a_state_that_is_a_view_is_written_too(backend: str) -> None:
    sequence = ssd_inputs(seq_len=1, dtype=torch.float32)
    inputs = step_inputs(sequence)
    wide = torch.zeros(*inputs["state"].shape[:3], 9, device=inputs["state"].device)
    view = wide[..., :5]
    view.copy_(inputs["state"])
    ssd_step(**inputs | {"state": view}, in_place=True, backend=backend)
    assert relative_rms_error(view, oracle_step(**in_double(inputs))[1]) < 2 * fp32_bound(sequence)
    assert not wide[..., 5:].any()


def test_in_place_refuses_gradients_and_narrow_states() -> None:
    inputs = step_inputs(ssd_inputs(seq_len=1, dtype=torch.float32))
    with pytest.raises(InputError, match="in_place overwrites what a gradient would need"):
        ssd_step(**inputs | {"q": inputs["q"].clone().requires_grad_()}, in_place=True)
    with pytest.raises(InputError, match=r"in place it is torch\.float32"):
        ssd_step(**inputs | {"state": inputs["state"].bfloat16()}, in_place=True)


@needs_triton
def test_the_kernels_are_ops_of_torch() -> None:
    from transmamba.ops.ssd_step.triton import ssd_step_in_place_op, ssd_step_op

    inputs = step_inputs(ssd_inputs((4, 2, 2, 4), seq_len=1, dtype=torch.float32))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ssd_step_op, tuple(inputs.values()), test_utils=checks)
    torch.library.opcheck(ssd_step_in_place_op, tuple(inputs.values()), test_utils=checks[:2])


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(64, 64), (96, 96), (128, 128), (256, 64), (37, 20)], ids=str)
def test_large_steps_on_a_card(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    shape = {"state_size": sizes[0], "head_dim": sizes[1]}
    sequence = ssd_inputs((16, 8, 8, 16), batch=300, seq_len=1, dtype=dtype, **shape)
    inputs = step_inputs(sequence) | {"state": sequence["initial_state"].float()}
    found = [ssd_step(**inputs, backend="triton") for _ in range(5)]
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))
    exact_y, exact_state = oracle_step(**in_double(inputs))
    assert relative_rms_error(found[0][0], exact_y) < rounding(dtype) + 2 * fp32_bound(sequence)
    assert relative_rms_error(found[0][1], exact_state) < 2 * fp32_bound(sequence)


@pytest.mark.gpu
@needs_triton
def test_states_beyond_two_to_the_31st_entries() -> None:
    rows = 2**31 // (16 * 128 * 128) + 2
    state = torch.zeros(rows, 16, 128, 128, device="cuda")
    q, k, v = (torch.ones(rows, 16, 128, device="cuda") for _ in range(3))
    dt, A = torch.ones(rows, 16, device="cuda"), -torch.ones(16, device="cuda")
    y, _ = ssd_step(state, q, k, v, dt, A, in_place=True, backend="triton")
    assert bool((y == 128).all())
    assert bool((state[-1] == 1).all())
