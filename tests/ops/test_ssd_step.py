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
from tests.ops.oracle import FAULTS, oracle_scan
from transmamba.ops import ssd_scan, ssd_step
from transmamba.ops.ssd_step import ssd_step_reference, ssd_step_torch

BACKENDS = ("reference", "torch")


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
