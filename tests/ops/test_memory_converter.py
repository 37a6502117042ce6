"""memory_converter: exactly the state of the recurrence, for any prefix; and that the printed formula is not."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import relative_rms_error
from tests.ops.cases import (
    BORDERS,
    CHUNK,
    FAULT_FACTOR,
    FP64_BOUND,
    HEADS,
    LENGTHS,
    Inputs,
    fp32_bound,
    gradients,
    in_double,
    long_inputs,
    ssd_inputs,
    without,
    worst_error,
)
from tests.ops.oracle import oracle_scan
from transmamba.ops import memory_converter, ssd_scan
from transmamba.ops.memory_converter import memory_converter_reference, memory_converter_torch

BACKENDS = ("reference", "torch")


def prefix_inputs(heads: tuple[int, int, int, int] = (4, 4, 4, 4), **shape: Any) -> Inputs:
    """Inputs of the converter; the queries' count is left out, for no query enters."""
    return without(ssd_inputs((1, *heads[1:]), **shape), "q", "D")


def oracle_state(k: Tensor, v: Tensor, dt: Tensor, A: Tensor, **options: Any) -> Tensor:
    return oracle_scan(k, k, v, dt, A, **options)[1]


@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("seq_len", [*LENGTHS, 300])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_it_is_the_state_of_the_recurrence(heads: tuple[int, int, int, int], seq_len: int, state: bool) -> None:
    inputs = prefix_inputs(heads, seq_len=seq_len, state=state)
    exact = oracle_state(**inputs)
    for backend in BACKENDS:
        assert relative_rms_error(memory_converter(**inputs, backend=backend), exact) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_final_state_of_ssd_scan(backend: str) -> None:
    inputs = ssd_inputs((8, 2, 2, 8), seq_len=3 * CHUNK + 1)
    _, final_state = ssd_scan(**inputs, return_final_state=True)
    state = memory_converter(**without(inputs, "q", "D"), backend=backend)
    assert relative_rms_error(state, final_state) < FP64_BOUND


@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("borders", [*BORDERS.values(), [0, 300, 300, 301]], ids=[*BORDERS, "long"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_prefixes_equal_separate_ones(backend: str, borders: list[int], state: bool) -> None:
    shape = {"batch": 1, "seq_len": borders[-1], "rows": len(borders) - 1, "state": state}
    inputs = prefix_inputs((8, 2, 2, 8), **shape)
    states = memory_converter(**inputs, cu_seqlens=borders, backend=backend)
    for i, (start, end) in enumerate(pairwise(borders)):
        one = inputs | {name: inputs[name][:, start:end] for name in ("k", "v", "dt")}
        one["initial_state"] = inputs["initial_state"][i : i + 1] if state else None
        assert relative_rms_error(states[i : i + 1], oracle_state(**one)) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_prefix_leaves_the_state_as_it_is(backend: str) -> None:
    inputs = prefix_inputs(seq_len=0)
    assert torch.equal(memory_converter(**inputs, backend=backend), inputs["initial_state"])
    zeros = memory_converter(**without(inputs, "initial_state"), backend=backend)
    assert torch.equal(zeros, torch.zeros_like(inputs["initial_state"]))


def test_an_empty_batch_gives_no_state() -> None:
    assert memory_converter(**prefix_inputs(batch=0, seq_len=4)).shape == (0, 4, 6, 5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("heads", [(1, 1, 2, 2), (1, 2, 1, 1), (1, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("implementation", [memory_converter_reference, memory_converter_torch], ids=BACKENDS)
def test_gradients_are_those_of_finite_differences(
    implementation: Any, heads: tuple[int, int, int, int], packed: bool
) -> None:
    shape = {"batch": 1, "rows": 3} if packed else {"batch": 2}
    inputs = prefix_inputs(heads, **shape, seq_len=5, state_size=2, head_dim=2, device="cpu", requires_grad=True)

    def state(*values: Tensor) -> Tensor:
        return implementation(**dict(zip(inputs, values, strict=True)), cu_seqlens=[0, 1, 1, 5] if packed else None)

    assert torch.autograd.gradcheck(state, tuple(inputs.values()))


@pytest.mark.parametrize("borders", [None, BORDERS["uneven"]], ids=["dense", "packed"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_those_of_the_matrix(
    backend: str, heads: tuple[int, int, int, int], borders: list[int] | None
) -> None:
    shape = {"batch": 1, "seq_len": borders[-1], "rows": len(borders) - 1} if borders else {"seq_len": CHUNK + 7}
    inputs = prefix_inputs(heads, **shape)
    exact = gradients(oracle_state, inputs, cu_seqlens=borders)
    assert worst_error(gradients(memory_converter, inputs, cu_seqlens=borders, backend=backend), exact) < FP64_BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_is_never_narrower_than_fp32(backend: str, dtype: torch.dtype) -> None:
    inputs = prefix_inputs((8, 2, 2, 8), seq_len=3 * CHUNK + 5, dtype=dtype)
    state = memory_converter(**inputs, backend=backend)
    assert state.dtype == torch.float32
    assert relative_rms_error(state, oracle_state(**in_double(inputs))) < fp32_bound(inputs)


def test_a_long_prefix_costs_no_precision() -> None:
    inputs = without(long_inputs(20_000), "q", "D")
    exact = memory_converter(**in_double(inputs))
    state = memory_converter(**inputs)
    S = (inputs["dt"] * inputs["A"]).cumsum(1)
    weights = inputs["dt"] * torch.exp(S[:, -1:] - S)
    from_the_start = torch.einsum("bth,bthn,bthp->bhnp", weights, inputs["k"], inputs["v"])
    bound = 2**-24 * 20_000**0.5  # one sum of 20,000 terms; exponents are summed from the end, where they are small
    assert all(relative_rms_error(state[:, head], exact[:, head]) < bound for head in range(3))
    assert relative_rms_error(from_the_start[:, 0], exact[:, 0]) > FAULT_FACTOR * bound


@pytest.mark.parametrize("fault", ["no decay", "no dt", "index shifted", "heads in turn"])
def test_the_bounds_would_show_a_wrong_converter(fault: str) -> None:
    inputs = prefix_inputs((2, 2, 6, 6), seq_len=CHUNK + 5)
    exact, wrong = oracle_state(**inputs), oracle_state(**inputs, fault=fault)
    assert relative_rms_error(wrong, exact) > FAULT_FACTOR * fp32_bound(inputs)
    wrong_gradients = gradients(partial(oracle_state, fault=fault), inputs)
    assert worst_error(wrong_gradients, gradients(oracle_state, inputs)) > FAULT_FACTOR * FP64_BOUND


def test_equation_nine_as_printed_is_not_the_state() -> None:
    """Without dt, and so with steps of softplus(N(-1, 1)) of about 0.4, the state is off by far more than rounding."""
    inputs = prefix_inputs(seq_len=CHUNK, state=False)
    printed = oracle_state(**inputs, fault="no dt")
    assert relative_rms_error(printed, memory_converter(**inputs)) > 0.3
