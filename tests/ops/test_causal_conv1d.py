"""causal_conv1d against torch's own convolution, with its past as a state."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, Inputs, gradients, in_double, rounding, worst_error
from transmamba.ops import causal_conv1d
from transmamba.ops.causal_conv1d import causal_conv1d_reference, causal_conv1d_torch

BACKENDS = ("reference", "torch")
CHANNELS = 5
convolve = partial(causal_conv1d, return_final_state=True)
BORDERS = {"uneven": [0, 0, 1, 3, 3, 10, 17, 17], "single tokens": [0, 1, 2, 3], "nothing": [0, 0, 0], "one": [0, 9]}


def conv_inputs(
    *,
    batch: int = 2,
    seq_len: int = 11,
    kernel: int = 4,
    rows: int | None = None,
    bias: bool = True,
    state: bool = True,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = DEVICE,
) -> Inputs:
    exact = {
        "x": torch.randn(batch, seq_len, CHANNELS),
        "weight": torch.randn(CHANNELS, kernel) / kernel**0.5,
        "bias": torch.randn(CHANNELS) if bias else None,
        "initial_state": torch.randn(batch if rows is None else rows, kernel - 1, CHANNELS) if state else None,
    }
    return {name: None if x is None else x.to(device, dtype) for name, x in exact.items()}


def oracle_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: list[int] | None = None,
    activation: str | None = None,
    fault: str | None = None,
) -> tuple[Tensor, Tensor]:
    """torch's conv1d over the past and the tokens; of every document when packed."""
    if cu_seqlens is not None and fault != "documents run together":
        pieces = [
            oracle_conv(
                x[:, start:end],
                weight,
                bias,
                None if initial_state is None else initial_state[i : i + 1],
                activation=activation,
                fault=fault,
            )
            for i, (start, end) in enumerate(pairwise(cu_seqlens))
        ]
        return torch.cat([y for y, _ in pieces], dim=1), torch.cat([state for _, state in pieces])
    kernel = weight.shape[1]
    no_past = initial_state is None or fault in ("past dropped", "documents run together")
    inputs = pad(x, (0, 0, kernel - 1, 0)) if no_past else torch.cat([initial_state, x], dim=1)
    taps = weight.flip(1) if fault == "taps reversed" else weight
    if x.numel():
        y = conv1d(inputs.transpose(1, 2), taps.unsqueeze(1), bias, groups=CHANNELS).transpose(1, 2)
    else:
        y = x + 0 * weight.sum() + (0 if bias is None else 0 * bias.sum())
    return silu(y) if activation == "silu" else y, inputs[:, x.shape[1] :]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
@pytest.mark.parametrize("seq_len", [0, 1, 2, 3, 4, 5, 31])
def test_every_length_and_kernel_equals_torch(
    seq_len: int, kernel: int, bias: bool, state: bool, activation: str | None
) -> None:
    inputs = conv_inputs(seq_len=seq_len, kernel=kernel, bias=bias, state=state)
    exact = oracle_conv(**inputs, activation=activation)
    for backend in BACKENDS:
        assert worst_error(convolve(**inputs, activation=activation, backend=backend), exact) < FP64_BOUND


@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_packed_documents_equal_separate_ones(borders: list[int], kernel: int, state: bool) -> None:
    inputs = conv_inputs(batch=1, seq_len=borders[-1], kernel=kernel, rows=len(borders) - 1, state=state)
    exact = oracle_conv(**inputs, cu_seqlens=borders, activation="silu")
    for backend in BACKENDS:
        out = convolve(**inputs, cu_seqlens=borders, activation="silu", backend=backend)
        assert worst_error(out, exact) < FP64_BOUND


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, 10, 11])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_cut_anywhere_equals_the_whole(backend: str, cut: int) -> None:
    inputs = conv_inputs()
    x = inputs["x"]
    before, state = convolve(**(inputs | {"x": x[:, :cut]}), backend=backend)
    after, state = convolve(**(inputs | {"x": x[:, cut:], "initial_state": state}), backend=backend)
    whole = convolve(**inputs, backend=backend)
    assert worst_error((torch.cat([before, after], dim=1), state), whole) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_an_empty_output(backend: str) -> None:
    y, state = convolve(**conv_inputs(batch=0), backend=backend)
    assert y.shape == (0, 11, CHANNELS)
    assert state.shape == (0, 3, CHANNELS)


def test_the_state_is_returned_on_request_only() -> None:
    assert isinstance(causal_conv1d(**conv_inputs()), Tensor)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("implementation", [causal_conv1d_reference, causal_conv1d_torch], ids=BACKENDS)
def test_gradients_are_those_of_finite_differences(implementation: Any, packed: bool) -> None:
    inputs = conv_inputs(batch=1 if packed else 2, seq_len=5, kernel=3, rows=3 if packed else None, device="cpu")

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(inputs, values, strict=True))
        return implementation(**given, activation="silu", cu_seqlens=[0, 1, 1, 5] if packed else None)

    assert torch.autograd.gradcheck(outputs, tuple(x.requires_grad_() for x in inputs.values()))


@pytest.mark.parametrize("borders", [None, BORDERS["uneven"]], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_those_of_torch(backend: str, borders: list[int] | None) -> None:
    shape = {} if borders is None else {"batch": 1, "seq_len": borders[-1], "rows": len(borders) - 1}
    inputs, options = conv_inputs(**shape), {"cu_seqlens": borders, "activation": "silu"}
    exact = gradients(oracle_conv, inputs, **options)
    assert worst_error(gradients(convolve, inputs, **options, backend=backend), exact) < FP64_BOUND


def bound_of(dtype: torch.dtype, kernel: int = 4) -> float:
    """A rounding after each tap, after the bias and after SiLU, in the inputs' dtype."""
    return (kernel + 2) * rounding(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_inputs_round_once_per_tap(backend: str, dtype: torch.dtype) -> None:
    inputs = conv_inputs(seq_len=101, dtype=dtype)
    y, state = convolve(**inputs, activation="silu", backend=backend)
    exact_y, exact_state = oracle_conv(**in_double(inputs), activation="silu")
    assert (y.dtype, state.dtype) == (dtype, dtype)
    assert relative_rms_error(y, exact_y) < bound_of(dtype)
    assert torch.equal(state.double(), exact_state)


@pytest.mark.parametrize("fault", ["taps reversed", "past dropped", "documents run together"])
def test_the_bounds_would_show_a_wrong_convolution(fault: str) -> None:
    borders = [0, 1, 3, 3, 5, 7]  # every output reads the past
    inputs = conv_inputs(batch=1, seq_len=borders[-1], rows=len(borders) - 1)
    exact, _ = oracle_conv(**inputs, cu_seqlens=borders)
    wrong, _ = oracle_conv(**inputs, cu_seqlens=borders, fault=fault)
    assert relative_rms_error(wrong, exact) > FAULT_FACTOR * bound_of(torch.bfloat16)
