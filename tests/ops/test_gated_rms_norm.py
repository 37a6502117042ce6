"""gated_rms_norm, by every backend, against its formula in fp64 from torch's own functions."""

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, Inputs, gradients, in_double, rounding, worst_error
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.ops import gated_rms_norm
from transmamba.ops.gated_rms_norm import gated_rms_norm_reference, gated_rms_norm_torch

BACKENDS = ("reference", "torch")
EPS = 0.5  # of a size that shows, and keeps the gradient of rows of one entry from cancelling
# batch, tokens, size: of one entry, primes, just over a block, empty ones
SHAPES = [(1, 1, 1), (2, 3, 5), (2, 37, 67), (1, 17, 33), (3, 9, 32), (0, 4, 5), (2, 0, 5), (2, 4, 0)]
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few entries and several steps, so that small rows cross them."""
    if "the_kernels" in request.node.name and DEVICE.type == "cpu":
        module = import_module("transmamba.ops.gated_rms_norm.triton")
        for name, value in (("BLOCK", (4, 32)), ("NORM_BLOCK", 128), ("PARTS", 3)):
            monkeypatch.setattr(module, name, value)


def draw(
    shape: tuple[int, ...] = (2, 11, 24), *, norm: bool = True, start: int = 0, dtype: torch.dtype = torch.float64
) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    *lead, tokens, size = shape
    gate = normal(*lead, tokens - start, size)
    return {"x": normal(*shape), "gate": 3 * gate, "weight": normal(size) if norm else None}


def formula(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, *, start: int = 0, fault: str | None = None
) -> Tensor:
    before, after = x[..., :start, :], x[..., start:, :]
    if fault == "norm before gate" and weight is not None:
        return torch.cat([before, rms_norm(after, after.shape[-1:], weight, EPS) * silu(gate)], dim=-2)
    y = after * (torch.sigmoid(gate) if fault == "sigmoid" else silu(gate))
    if weight is not None and y.shape[-1]:
        y = rms_norm(y, y.shape[-1:], weight, 0.0 if fault == "no eps" else EPS)
    return torch.cat([silu(before) if fault == "prefix gated" else before, y], dim=-2)


def bound_of(dtype: torch.dtype, size: int) -> float:
    """A handful of fp32 operations on an entry, of which some are approximate, and a sum over a row; then a rounding of
    the output, twice as far in the interpreter, which cuts bf16 off.
    """
    exact = 2**-24 * (16 + size**0.5)
    return exact if dtype == torch.float32 else 2 * rounding(dtype) + exact


@pytest.mark.parametrize("start", [0, 1, "all"])
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_fp64_it_is_the_formula(shape: tuple[int, ...], norm: bool, start: int | str) -> None:
    start = shape[-2] if start == "all" else min(int(start), shape[-2])
    inputs = draw(shape, norm=norm, start=start)
    exact, exact_gradients = formula(**inputs, start=start), gradients(formula, inputs, start=start)
    for backend in BACKENDS:
        run = partial(gated_rms_norm, eps=EPS, start=start, backend=backend)
        assert relative_rms_error(run(**inputs), exact) < FP64_BOUND
        assert worst_error(gradients(run, inputs), exact_gradients) < FP64_BOUND


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
@pytest.mark.parametrize("implementation", [gated_rms_norm_reference, gated_rms_norm_torch], ids=BACKENDS)
def test_gradients_are_those_of_finite_differences(implementation: Any, norm: bool, start: int) -> None:
    inputs = {name: x for name, x in draw((2, 5, 3), norm=norm, start=start).items() if x is not None}

    def output(*values: Tensor) -> Tensor:
        return implementation(*values, *(() if norm else (None,)), EPS, start)

    assert torch.autograd.gradcheck(output, tuple(x.requires_grad_() for x in inputs.values()))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
def test_plain_pytorch_rounds_narrow_inputs_after_each_function(norm: bool, dtype: torch.dtype) -> None:
    inputs = draw((2, 101, 48), norm=norm, dtype=dtype)
    y = gated_rms_norm(**inputs, eps=EPS, backend="torch")
    assert y.dtype == dtype
    assert relative_rms_error(y, formula(**in_double(inputs))) < 4 * rounding(dtype)  # SiLU, product, norm, weight


@needs_triton
@pytest.mark.parametrize("start", [0, 1, "all"])
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_agree_in_values_and_gradients(shape: tuple[int, ...], norm: bool, start: int | str) -> None:
    start = shape[-2] if start == "all" else min(int(start), shape[-2])
    inputs = draw(shape, norm=norm, start=start, dtype=torch.float32)
    run = partial(gated_rms_norm, eps=EPS, start=start, backend="triton")
    bound = bound_of(torch.float32, shape[-1] + shape[-2] * shape[0])
    assert relative_rms_error(run(**inputs), formula(**in_double(inputs), start=start)) < bound
    exact = gradients(formula, in_double(inputs), start=start)
    assert worst_error(gradients(run, inputs), exact) < 4 * bound  # differences of the norm's gradient cancel


@needs_triton
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
def test_the_kernels_round_narrow_inputs_once(norm: bool, dtype: torch.dtype) -> None:
    inputs = draw((2, 37, 48), norm=norm, start=5, dtype=dtype)
    run = partial(gated_rms_norm, eps=EPS, start=5, backend="triton")
    y = run(**inputs)
    assert y.dtype == dtype
    assert torch.equal(y[:, :5], inputs["x"][:, :5])
    assert relative_rms_error(y, formula(**in_double(inputs), start=5)) < bound_of(dtype, 48)
    found = gradients(run, inputs)
    assert [x.dtype for x in found] == [dtype] * len(found)
    assert worst_error(found, gradients(formula, in_double(inputs), start=5)) < bound_of(dtype, 48)


@needs_triton
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
def test_the_kernels_read_slices_and_any_number_of_dimensions(norm: bool) -> None:
    inputs = draw((2, 11, 24), norm=norm, dtype=torch.float32)
    wide = torch.randn(2, 15, 50, device=DEVICE)
    run = partial(gated_rms_norm, eps=EPS, backend="triton")
    forms = {
        "tokens": (wide[:, 4:, :24], wide[:, :11, 24:48]),
        "columns": (wide[:, :11, 1:49:2], wide[:, :11, 24:48]),
        "two dimensions": (wide[0, :, :24], wide[1, :, :24]),
        "one dimension": (wide[0, 0, :24], wide[1, 2, :24]),
        "four dimensions": (wide[:, :10, :24].unflatten(1, (2, 5)), wide[:, 5:, :24].unflatten(1, (2, 5))),
    }
    for x, gate in forms.values():
        given = inputs | {"x": x, "gate": gate}
        bound = 4 * bound_of(torch.float32, 24)
        assert relative_rms_error(run(**given), formula_of(given)) < bound
        assert worst_error(gradients(run, given), gradients(formula_of_all, in_double(given))) < bound


def formula_of(inputs: Inputs) -> Tensor:
    return formula_of_all(**in_double(inputs))


def formula_of_all(x: Tensor, gate: Tensor, weight: Tensor | None) -> Tensor:
    return formula(x[None], gate[None], weight)[0] if x.dim() == 1 else formula(x, gate, weight)


@needs_triton
def test_the_kernels_take_dtypes_that_differ() -> None:
    """As under autocast: inputs of 16 bits, a weight of 32."""
    inputs = draw((2, 11, 24), dtype=torch.float32)
    inputs |= {"x": inputs["x"].bfloat16(), "gate": inputs["gate"].bfloat16()}
    for backend in ("torch", "triton"):
        run = partial(gated_rms_norm, eps=EPS, backend=backend)
        assert relative_rms_error(run(**inputs), formula(**in_double(inputs))) < 4 * rounding(torch.bfloat16)
        assert [x.dtype for x in (run(**inputs), *gradients(run, inputs))] == [torch.bfloat16] * 3 + [torch.float32]


@needs_triton
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
def test_the_kernels_are_ops_of_torch(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("transmamba.ops.gated_rms_norm.triton")
    inputs = draw(norm=norm, start=3, dtype=torch.float32)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(module.gated_rms_norm_op, (*inputs.values(), EPS, 3), test_utils=checks)
    run = partial(gated_rms_norm, eps=EPS, start=3, backend="triton")
    direct = [run(**inputs), *gradients(run, inputs)]
    monkeypatch.setattr("transmamba.ops.launching.goes_around_registration", lambda *_: False)
    registered = [run(**inputs), *gradients(run, inputs)]
    assert all(torch.equal(a, b) for a, b in zip(direct, registered, strict=True))


@needs_triton
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_compiled_call_is_one_graph(backend: str) -> None:
    inputs = draw(start=3, dtype=torch.float32)
    run = partial(gated_rms_norm, eps=EPS, start=3, backend=backend, validate=False)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert relative_rms_error(compiled(**inputs), run(**inputs)) < 1e-6
    assert worst_error(gradients(compiled, inputs), gradients(run, inputs)) < 1e-6
    torch.compiler.reset()


@pytest.mark.parametrize("fault", ["norm before gate", "sigmoid", "no eps", "prefix gated"])
def test_the_bounds_would_show_a_fault(fault: str) -> None:
    inputs = draw(start=3)
    error = relative_rms_error(formula(**inputs, start=3, fault=fault), formula(**inputs, start=3))
    assert error > FAULT_FACTOR * 4 * bound_of(torch.float32, 24)


@needs_triton
def test_a_fault_of_the_kernels_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that forgets how the row's root depends on x."""
    module = import_module("transmamba.ops.gated_rms_norm.triton")
    inputs = draw(dtype=torch.float32)
    run, run_backward = partial(gated_rms_norm, eps=EPS, backend="triton"), module.run_backward

    def forgetful(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, inverse: Tensor, start: int) -> Any:
        dx, dgate, _ = run_backward(dy * weight * inverse[..., None], x, gate, None, inverse[:0], start)
        return dx, dgate, run_backward(dy, x, gate, weight, inverse, start)[2]

    monkeypatch.setattr(module, "run_backward", forgetful)
    exact = gradients(formula, in_double(inputs))
    assert worst_error(gradients(run, inputs), exact) > FAULT_FACTOR * 4 * bound_of(torch.float32, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(2, 11, 23)}, r"gate has shape \(2, 11, 23\) and x \(2, 11, 24\)"),
        ({"start": 1}, r"give \(2, 10, 24\)"),
        ({"start": 12}, r"x has shape \(2, 11, 24\) and start is 12"),
        ({"start": -1}, "start is -1; give a whole number >= 0"),
        ({"start": True}, "start is True"),
        ({"weight": torch.zeros(23)}, r"weight has shape \(23,\); give \(24,\), or None"),
        ({"x": torch.zeros(2, 11, 24, dtype=torch.int64)}, "x has dtype torch.int64"),
        ({"gate": torch.full((2, 11, 24), float("nan"))}, "gate holds NaN at 528 of 528 places"),
    ],
    ids=str,
)
def test_wrong_inputs_are_named(change: dict[str, Any], message: str) -> None:
    given = {"x": torch.zeros(2, 11, 24), "gate": torch.zeros(2, 11, 24)} | change
    with pytest.raises(InputError, match="gated_rms_norm: .*" + message):
        gated_rms_norm(**given)


@needs_triton
def test_rows_beyond_a_programs_registers_are_refused() -> None:
    x = torch.zeros(1, 8193, device=DEVICE)
    with pytest.raises(InputError, match="no kernel for the norm of 8193 columns, at most 8192; pass backend='torch'"):
        gated_rms_norm(x, x, x[0], backend="triton")
    assert gated_rms_norm(x, x, backend="triton").shape == x.shape


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
@pytest.mark.parametrize("size", [96, 1024, 1536, 2816, 5000, 8192])
def test_rows_of_models_on_a_card(size: int, norm: bool, dtype: torch.dtype) -> None:
    inputs = draw((3, 411, size), norm=norm, start=128, dtype=dtype)
    run = partial(gated_rms_norm, eps=EPS, start=128, backend="triton")
    bound = bound_of(dtype, size + 3 * 411)
    assert relative_rms_error(run(**inputs), formula(**in_double(inputs), start=128)) < bound
    found = [gradients(run, inputs) for _ in range(5)]
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))
    assert worst_error(found[0], gradients(formula, in_double(inputs), start=128)) < 4 * bound


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("norm", [False, True], ids=["gate", "norm"])
def test_more_than_two_to_the_31_entries(norm: bool) -> None:
    size, tokens = 1024, 2**21 + 3
    x = torch.randn(1, tokens, size, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.rand(size, device=DEVICE) if norm else None
    y = gated_rms_norm(x, x.detach(), weight, eps=EPS, backend="triton")
    (dx,) = torch.autograd.grad(y, x, x.detach())
    part = x.detach()[:, -5:].double().requires_grad_()
    exact = formula(part, part.detach(), None if weight is None else weight.double())
    (exact_dx,) = torch.autograd.grad(exact, part, part.detach())
    assert relative_rms_error(y[:, -5:], exact) < bound_of(torch.bfloat16, size)
    assert relative_rms_error(dx[:, -5:], exact_dx) < bound_of(torch.bfloat16, size)
