"""causal_conv1d against torch's own convolution, with its past as a state."""

from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, Inputs, gradients, in_double, rounding, worst_error
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.ops import causal_conv1d
from transmamba.ops.causal_conv1d import causal_conv1d_reference, causal_conv1d_torch

BACKENDS = ("reference", "torch")
CHANNELS = 5
convolve = partial(causal_conv1d, return_final_state=True)
BORDERS = {"uneven": [0, 0, 1, 3, 3, 10, 17, 17], "single tokens": [0, 1, 2, 3], "nothing": [0, 0, 0], "one": [0, 9]}


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 5 tokens, in blocks of 4 segments and 4 channels, so that small rows cross several."""
    if "the_kernels" in request.node.name and DEVICE.type == "cpu":
        module = import_module("transmamba.ops.causal_conv1d.triton")
        for name, value in (("BLOCK_S", 4), ("BLOCK_C", 4), ("STEPS", 5), ("STEPS_BACKWARD", 5)):
            monkeypatch.setattr(module, name, value)


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


@needs_triton
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
@pytest.mark.parametrize("form", [1, 3, 40, *BORDERS], ids=str)
def test_the_kernels_agree_in_values_and_gradients(
    form: int | str, kernel: int, state: bool, activation: str | None
) -> None:
    borders = BORDERS[form] if isinstance(form, str) else None
    shape = {"seq_len": form} if borders is None else {"batch": 1, "seq_len": borders[-1], "rows": len(borders) - 1}
    inputs = conv_inputs(**shape, kernel=kernel, state=state, bias=state, dtype=torch.float32)
    options = {"cu_seqlens": borders, "activation": activation}
    bound = 2**-24 * 4 * (kernel + shape["seq_len"] ** 0.5 + 4)  # sums over taps, and over tokens in the gradients
    assert (
        worst_error(convolve(**inputs, **options, backend="triton"), oracle_conv(**in_double(inputs), **options))
        < bound
    )
    found = gradients(convolve, inputs, **options, backend="triton")
    assert worst_error(found, gradients(oracle_conv, in_double(inputs), **options)) < bound


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_round_narrow_inputs_once(dtype: torch.dtype) -> None:
    inputs = conv_inputs(seq_len=70, dtype=dtype)
    y, state = convolve(**inputs, activation="silu", backend="triton")
    exact_y, exact_state = oracle_conv(**in_double(inputs), activation="silu")
    assert relative_rms_error(y, exact_y) < 2 * rounding(dtype) + 1e-6  # the interpreter cuts bf16 off
    assert torch.equal(state.double(), exact_state)
    found = gradients(convolve, inputs, activation="silu", backend="triton")
    assert worst_error(found, gradients(oracle_conv, in_double(inputs), activation="silu")) < 6 * rounding(dtype)


@needs_triton
def test_the_kernels_read_slices_and_refuse_many_taps() -> None:
    inputs = conv_inputs(dtype=torch.float32)
    wide = torch.randn(2, 11, 3 * CHANNELS, device=DEVICE)
    given = inputs | {"x": wide[..., CHANNELS : 2 * CHANNELS]}
    assert worst_error(convolve(**given, backend="triton"), oracle_conv(**in_double(given))) < 1e-6
    assert causal_conv1d(**conv_inputs(batch=0, dtype=torch.float32), backend="triton").shape == (0, 11, CHANNELS)
    with pytest.raises(InputError, match="no kernel for 9 taps, at most 8"):
        causal_conv1d(**conv_inputs(kernel=9, dtype=torch.float32), backend="triton")


@needs_triton
def test_the_kernels_are_ops_of_torch() -> None:
    from transmamba.ops.causal_conv1d.triton import causal_conv1d_op

    inputs = conv_inputs(dtype=torch.float32)
    given = (inputs["x"], inputs["weight"], inputs["bias"], inputs["initial_state"], None, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(causal_conv1d_op, given, test_utils=checks)


@needs_triton
def test_the_kernels_registered_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = conv_inputs(dtype=torch.float32), {"activation": "silu", "backend": "triton"}
    direct = gradients(convolve, inputs, **options)
    monkeypatch.setattr("transmamba.ops.launching.goes_around_registration", lambda *_: False)
    assert all(torch.equal(a, b) for a, b in zip(direct, gradients(convolve, inputs, **options), strict=True))


@needs_triton
def test_a_fault_of_the_kernels_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that get no gradient from the segment behind theirs."""
    module = import_module("transmamba.ops.causal_conv1d.triton")
    inputs, run_backward = conv_inputs(seq_len=40, dtype=torch.float32), module.run_backward

    def in_pieces(dy: Tensor, x: Tensor, *rest: Any) -> Any:
        dx, *others = run_backward(dy, x, *rest)
        dx[:, 17:20] = run_backward(dy[:, 17:20], x[:, 17:20], *rest)[0]
        return dx, *others

    monkeypatch.setattr(module, "run_backward", in_pieces)
    found = gradients(convolve, inputs, activation="silu", backend="triton")
    exact = gradients(oracle_conv, in_double(inputs), activation="silu")
    assert worst_error(found, exact) > FAULT_FACTOR * bound_of(torch.float32)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("borders", [None, [0, 1, 3, 3, 1000, 4097]], ids=["dense", "packed"])
def test_long_rows_of_many_channels_on_a_card(borders: list[int] | None, dtype: torch.dtype) -> None:
    rows, batch = (5, 1) if borders else (3, 3)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    inputs = {"x": normal(batch, 4097, 1000), "weight": normal(1000, 4) / 2, "bias": normal(1000)}
    inputs["initial_state"] = normal(rows, 3, 1000)
    options = {"activation": "silu", "cu_seqlens": borders}
    plain = partial(convolve, backend="torch")
    found = [gradients(convolve, inputs, **options, backend="triton") for _ in range(5)]
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))
    assert worst_error(found[0], gradients(plain, in_double(inputs), **options)) < 4 * rounding(dtype) + 1e-5
    exact = plain(**in_double(inputs), **options)
    assert worst_error(convolve(**inputs, **options, backend="triton"), exact) < rounding(dtype) + 1e-6


@pytest.mark.gpu
@needs_triton
def test_more_than_two_to_the_31_entries_on_a_card() -> None:
    channels, tokens, few = 1024, 2**21 + 3, 40
    x = torch.randn(1, tokens, channels, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(channels, 4, device=DEVICE) / 2
    y = causal_conv1d(x, weight, activation="silu", backend="triton")
    (dx,) = torch.autograd.grad(y, x, x.detach())
    part = x.detach()[:, -few:].double().requires_grad_()
    exact = causal_conv1d(part, weight.double(), activation="silu", backend="torch")
    (exact_dx,) = torch.autograd.grad(exact, part, part.detach())
    assert relative_rms_error(y[:, 3 - few :], exact[:, 3:]) < 2 * rounding(torch.bfloat16)
    assert relative_rms_error(dx[:, 3 - few :], exact_dx[:, 3:]) < 2 * rounding(torch.bfloat16)
