"""token_cosines, by every backend, against torch's own functions in fp64."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, gradients, rounding
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.ops import token_cosines
from transmamba.ops.token_cosines import token_cosines_torch

BACKENDS = ("reference", "torch")
# directions, batch, steps, width, tokens: primes, a width over a power of two, of which rows are left over, empty ones
SHAPES = [(1, 1, 1, 2, 1), (2, 3, 5, 7, 6), (4, 2, 11, 65, 13), (3, 1, 37, 96, 40), (2, 0, 3, 4, 3), (2, 2, 0, 4, 3)]


def draw(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, mean: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    directions, batch, steps, width, tokens = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(directions, batch, steps, width, generator=generator, dtype=torch.float64) + mean
    y = torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64) * 3 - 1
    places = torch.randint(max(1, tokens), (directions, steps), generator=generator)
    wide = torch.promote_types(dtype, torch.float32)  # tokens of a residual stream, as the teacher's are
    return x.to(DEVICE, dtype), y.to(DEVICE, wide), places.to(DEVICE)


def formula(x: Tensor, y: Tensor, places: Tensor, *, fault: str | None = None) -> Tensor:
    chosen = torch.stack([y[:, at.flip(0) if fault == "order" else at] for at in places])
    if fault == "means stay":
        return cosine_similarity(x, chosen, dim=-1)
    return cosine_similarity(layer_norm(x, x.shape[-1:]), layer_norm(chosen, y.shape[-1:]), dim=-1)


def bound_of(dtype: torch.dtype, width: int, mean: float = 2.0) -> float:
    """Of values: sums over a row, and a mean that is taken off. dx is then rounded once, twice as far in the
    interpreter, which cuts bf16 off.
    """
    exact = 2**-24 * (32 + width**0.5) * max(1.0, abs(mean))
    return exact if dtype == torch.float32 else 2 * rounding(dtype) + exact


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_fp64_it_is_the_formula(shape: tuple[int, ...]) -> None:
    x, y, places = draw(shape)
    for backend in BACKENDS:
        run = partial(token_cosines, y=y, places=places, backend=backend)
        assert relative_rms_error(run(x), formula(x, y, places)) < FP64_BOUND
        exact = gradients(partial(formula, y=y, places=places), {"x": x})[0]
        if shape[3] > 2:  # of two numbers without their mean every cosine is 1 or -1, and the gradient is rounding
            assert relative_rms_error(gradients(run, {"x": x})[0], exact) < FP64_BOUND


def test_gradients_are_those_of_finite_differences() -> None:
    x, y, places = draw((2, 2, 3, 5, 4))
    assert torch.autograd.gradcheck(lambda x: token_cosines_torch(x, y, places), (x.requires_grad_(),))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_agree_in_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y, places = draw(shape, dtype)
    run = partial(token_cosines, y=y, places=places, backend="triton")
    exact = partial(formula, y=y.double(), places=places)
    found = run(x)
    assert found.dtype == torch.float32
    assert relative_rms_error(found, exact(x.double())) < bound_of(torch.float32, shape[3])
    if shape[3] > 2:
        found, wanted = gradients(run, {"x": x})[0], gradients(exact, {"x": x.double()})[0]
        assert found.dtype == dtype
        assert relative_rms_error(found, wanted) < 4 * bound_of(dtype, shape[3])  # differences, which cancel


@needs_triton
def test_a_large_mean_loses_nothing_beyond_its_own_rounding() -> None:
    x, y, places = draw((2, 2, 9, 48, 9), torch.float32, mean=300.0)
    found = token_cosines(x, y, places, backend="triton")
    assert relative_rms_error(found, formula(x.double(), y.double(), places)) < bound_of(torch.float32, 48, 300.0)


@needs_triton
def test_the_kernels_read_rows_that_lie_apart_and_two_that_are_empty_of_content() -> None:
    wide, (_, y, places) = torch.randn(2, 2, 10, 40, device=DEVICE), draw((2, 2, 9, 16, 9), torch.float32)
    for x in (wide[:, :, 1:, :16], wide[:, :, :9, ::2][..., :16]):
        found = token_cosines(x, y, places, backend="triton")
        assert relative_rms_error(found, formula(x.double(), y.double(), places)) < bound_of(torch.float32, 16)
    for backend in (*BACKENDS, "triton"):
        assert not token_cosines(torch.zeros(2, 2, 9, 16, device=DEVICE), y, places, backend=backend).any()


@needs_triton
def test_the_kernel_is_a_registered_op() -> None:
    from transmamba.ops.token_cosines.triton import token_cosines_op

    x, y, places = draw((2, 2, 3, 5, 4), torch.float32)
    torch.library.opcheck(token_cosines_op, (x.requires_grad_(), y, places))


@pytest.mark.parametrize("fault", ["order", "means stay"])
def test_the_bounds_see_a_fault(fault: str) -> None:
    x, y, places = draw((2, 3, 11, 24, 12))
    error = relative_rms_error(formula(x, y, places, fault=fault), formula(x, y, places))
    assert error > FAULT_FACTOR * 4 * bound_of(torch.bfloat16, 24)


def test_what_does_not_fit_is_one_line() -> None:
    x, y, places = (given.cpu() for given in draw((2, 3, 5, 4, 6)))  # where values are read
    with pytest.raises(InputError, match=r"token_cosines: x has shape \(3, 5, 4\) and y \(3, 6, 4\)"):
        token_cosines(x[0], y, places)
    with pytest.raises(InputError, match=r"places has shape \(2, 3\), dtype torch.int64 .*; give \(2, 5\), \(direct"):
        token_cosines(x, y, places[:, :3])
    with pytest.raises(InputError, match="token_cosines: y holds NaN"):
        token_cosines(x, y + float("nan"), places)
    assert not token_cosines(x, y.requires_grad_(), places).requires_grad
