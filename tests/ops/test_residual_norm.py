"""residual_norm and post_norm, by every backend, against torch's own norms in fp64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, Inputs, gradients, in_double, rounding, worst_error
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.ops import post_norm, residual_norm
from transmamba.ops.residual_norm import post_norm_torch, residual_norm_torch

BACKENDS = ("reference", "torch")
EPS = 2.0  # of a size that shows
# rows of one entry, primes, a size over a power of two and rows that do not fill a program, none
SHAPES = [(1, 2), (2, 3, 5), (37, 65), (3, 7, 96), (0, 4), (2, 0, 3)]
KINDS = {
    "layer norm": (True, True),
    "no bias": (True, False),
    "RMS norm": (False, False),
    "RMS and bias": (False, True),
}


@pytest.fixture(autouse=True)
def several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, of several steps each, as long tensors have."""
    from transmamba.ops.residual_norm import triton

    monkeypatch.setattr(triton, "PARTS", 2)
    monkeypatch.setattr(triton, "BLOCK_ENTRIES", 256)


def draw(shape: tuple[int, ...], bias: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    x, weight, shift = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[-1:], shape[-1:])
    )
    return {name: y.to(DEVICE, dtype) for name, y in {"x": x * 2 + 1, "weight": weight}.items()} | {
        "bias": shift.to(DEVICE, dtype) if bias else None
    }


def formula(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, centred: bool = True, fault: str | None = None
) -> tuple[Tensor, Tensor]:
    eps = 0.0 if fault == "no eps" else EPS
    if centred and fault != "mean stays":
        return layer_norm(x, weight.shape, weight, bias, eps), x
    y = rms_norm(x, weight.shape, weight, eps)
    return y if bias is None else y + bias, x * (0 if fault == "stream lost" else 1)


def draw_both(shape: tuple[int, ...], bias: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    """With a branch, in dtype; the rest is fp32 at least."""
    branch = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 2
    return draw(shape, bias, torch.promote_types(dtype, torch.float32)) | {"branch": branch.to(DEVICE, dtype)}


def formula_of_sum(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    centred: bool = True,
    fault: str | None = None,
) -> Tensor:
    if fault == "branch without gradient":
        branch = branch.detach() + 0 * branch
    total = x if fault == "branch lost" else x + branch
    return formula(total, weight, bias, centred=centred, fault=fault)[0]


def bound_of(dtype: torch.dtype, terms: int) -> float:
    """Sums over a row, and in gradients over rows, in fp32; an output in 16 bits is rounded, twice as far in the
    interpreter, which cuts bf16 off.
    """
    exact = 2**-24 * (32 + terms**0.5)
    return exact if dtype == torch.float32 else 2 * rounding(dtype) + exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_fp64_it_is_the_formula(shape: tuple[int, ...], kind: str) -> None:
    centred, bias = KINDS[kind]
    inputs, exact = draw(shape, bias), partial(formula, centred=centred)
    for backend in BACKENDS:
        run = partial(residual_norm, eps=EPS, centred=centred, backend=backend)
        assert worst_error(run(**inputs), exact(**inputs)) < FP64_BOUND
        assert worst_error(gradients(run, inputs), gradients(exact, inputs)) < FP64_BOUND


def test_gradients_are_those_of_finite_differences() -> None:
    leaves = tuple(x.requires_grad_() for x in draw((2, 3, 5)).values())
    assert torch.autograd.gradcheck(lambda *given: residual_norm_torch(*given, EPS, True, torch.float64), leaves)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_agree_in_values_and_gradients(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    """The stream is fp32, the norm in dtype, as in a step under autocast; so is the gradient that comes back."""
    centred, bias = KINDS[kind]
    inputs, exact = draw(shape, bias, torch.float32), partial(formula, centred=centred)
    run = partial(residual_norm, eps=EPS, centred=centred, dtype=dtype, backend="triton")
    found, terms = run(**inputs), inputs["x"].numel()
    assert [one.dtype for one in found] == [dtype, torch.float32]
    assert worst_error(found, exact(**in_double(inputs))) < bound_of(dtype, shape[-1])
    # Of the cotangents, which are drawn in fp64, those of the norm are rounded to dtype first.
    bound = 8 * bound_of(dtype, terms)  # differences, which cancel
    assert worst_error(gradients(run, inputs), gradients(exact, in_double(inputs))) < bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_a_sum_it_is_the_formula_in_fp64(shape: tuple[int, ...], kind: str) -> None:
    centred, bias = KINDS[kind]
    inputs, exact = draw_both(shape, bias), partial(formula_of_sum, centred=centred)
    for backend in BACKENDS:
        run = partial(post_norm, eps=EPS, centred=centred, backend=backend)
        assert relative_rms_error(run(**inputs), exact(**inputs)) < FP64_BOUND
        assert worst_error(gradients(run, inputs), gradients(exact, inputs)) < FP64_BOUND


def test_gradients_of_a_sum_are_those_of_finite_differences() -> None:
    given = draw_both((2, 3, 5))
    leaves = tuple(given[name].requires_grad_() for name in ("x", "branch", "weight", "bias"))
    assert torch.autograd.gradcheck(lambda *given: post_norm_torch(*given, EPS, True, torch.float64), leaves)


@needs_triton
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_agree_of_a_sum(shape: tuple[int, ...], kind: str, dtype: torch.dtype, stream: torch.dtype) -> None:
    """The branch is in dtype and the norm in the wider of both: under autocast, and a whole model in 16 bits."""
    centred, bias = KINDS[kind]
    inputs, exact = draw_both(shape, bias, dtype), partial(formula_of_sum, centred=centred)
    wider = torch.promote_types(dtype, stream)
    inputs = {name: x if x is None or name == "branch" else x.to(wider) for name, x in inputs.items()}
    inputs["x"] = inputs["x"].to(stream)
    run = partial(post_norm, eps=EPS, centred=centred, backend="triton")
    found, terms = run(**inputs), inputs["x"].numel()
    assert found.dtype == wider
    assert relative_rms_error(found, exact(**in_double(inputs))) < bound_of(wider, shape[-1])
    least = min(dtype, stream, key=lambda one: one.itemsize)  # one of the gradients is rounded to it
    for one, wanted in zip(gradients(run, inputs), gradients(exact, in_double(inputs)), strict=True):
        assert relative_rms_error(one, wanted) < 8 * bound_of(least, terms)  # differences, which cancel


@needs_triton
@pytest.mark.parametrize("which", [0, 1])
def test_one_output_may_be_left_unread(which: int) -> None:
    inputs = draw((5, 24), dtype=torch.float32)

    def one(op: Any, **given: Tensor) -> Tensor:
        return op(**given)[which]

    found = gradients(partial(one, partial(residual_norm, eps=EPS, backend="triton")), inputs)
    assert worst_error(found, gradients(partial(one, formula), in_double(inputs))) < 8 * bound_of(torch.float32, 120)


@needs_triton
def test_the_kernels_read_slices() -> None:
    wide, inputs = torch.randn(2, 9, 40, device=DEVICE), draw((2, 9, 16), dtype=torch.float32)
    for x in (wide[:, 1:, :16], wide[:, :, ::2][..., :16], wide[0, :, 8:24]):
        given = inputs | {"x": x}
        found = residual_norm(**given, eps=EPS, backend="triton")
        assert worst_error(found, formula(**in_double(given))) < bound_of(torch.float32, 16)
        given = draw(tuple(x.shape), dtype=torch.float32) | {"branch": x}
        for one in (given, given | {"x": x, "branch": given["x"]}):
            of_sum, exact = partial(post_norm, eps=EPS, backend="triton"), gradients(formula_of_sum, in_double(one))
            assert relative_rms_error(of_sum(**one), formula_of_sum(**in_double(one))) < bound_of(torch.float32, 16)
            assert worst_error(gradients(of_sum, one), exact) < 8 * bound_of(torch.float32, x.numel())


@needs_triton
def test_the_kernel_is_a_registered_op() -> None:
    from transmamba.ops.residual_norm.triton import residual_norm_op

    x, weight, bias = (one.requires_grad_() for one in draw((2, 3, 8), dtype=torch.float32).values())
    torch.library.opcheck(residual_norm_op, (x, None, weight, bias, EPS, True, torch.bfloat16))
    torch.library.opcheck(residual_norm_op, (x, None, weight, None, EPS, False, torch.float32))
    branch = torch.randn(2, 3, 8, device=DEVICE).bfloat16().requires_grad_()
    torch.library.opcheck(residual_norm_op, (x, branch, weight, bias, EPS, True, torch.float32))


@pytest.mark.parametrize("fault", ["no eps", "mean stays", "stream lost"])
def test_the_bounds_see_a_fault(fault: str) -> None:
    inputs = draw((2, 11, 24))
    centred = fault != "stream lost"
    wrong, exact = formula(**inputs, centred=centred, fault=fault), formula(**inputs, centred=centred)
    assert worst_error(wrong, exact) > FAULT_FACTOR * bound_of(torch.bfloat16, 24)


@pytest.mark.parametrize("fault", ["no eps", "mean stays", "branch lost", "branch without gradient"])
def test_the_bounds_see_a_fault_of_a_sum(fault: str) -> None:
    inputs, wrong = draw_both((2, 11, 24)), partial(formula_of_sum, fault=fault)
    errors = [relative_rms_error(wrong(**inputs), formula_of_sum(**inputs)) / bound_of(torch.bfloat16, 24)]
    slopes = zip(gradients(wrong, inputs), gradients(formula_of_sum, inputs), strict=True)
    errors += [relative_rms_error(one, exact) / (8 * bound_of(torch.bfloat16, 2 * 11 * 24)) for one, exact in slopes]
    assert max(errors) > FAULT_FACTOR


def test_what_does_not_fit_is_one_line() -> None:
    x, weight = torch.zeros(2, 5, 4), torch.ones(4)
    with pytest.raises(InputError, match=r"residual_norm: weight has shape \(3,\) and x \(2, 5, 4\); give \(4,\)"):
        residual_norm(x, weight[:3])
    with pytest.raises(InputError, match=r"bias has shape \(2, 2\)"):
        residual_norm(x, weight, weight.reshape(2, 2))
    with pytest.raises(InputError, match="residual_norm: x holds NaN"):
        residual_norm(x + float("nan"), weight)
    with pytest.raises(InputError, match=r"post_norm: branch has shape \(5, 4\) and x \(2, 5, 4\); give both alike"):
        post_norm(x, x[0], weight)
    with pytest.raises(InputError, match=r"post_norm: weight has shape \(3,\) and x \(2, 5, 4\); give \(4,\)"):
        post_norm(x, x, weight[:3])
    with pytest.raises(InputError, match="post_norm: branch holds NaN"):
        post_norm(x, x + float("nan"), weight)
