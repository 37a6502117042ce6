"""merge_scans and begin_scans, by every backend, against their formulas in fp64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, Inputs, gradients, in_double, rounding, worst_error
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.ops import begin_scans, merge_scans
from transmamba.ops.merge_scans import begin_scans_torch, merge_scans_torch

BACKENDS = ("reference", "torch")
# directions, batch, patches, width: of one entry, primes, just over a block of columns, empty ones
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (4, 2, 11, 65), (3, 1, 37, 96), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)]


def places_of(directions: int, patches: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(patches, generator=generator) for _ in range(directions)]).to(DEVICE)


def draw(shape: tuple[int, ...], *, gate: bool = True, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    y, z = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[1:]))
    return {"y": y.to(DEVICE, dtype), "gate": 3 * z.to(DEVICE, dtype) if gate else None}


def merged(y: Tensor, gate: Tensor | None = None, *, places: Tensor, fault: str | None = None) -> tuple[Tensor, Tensor]:
    steps = torch.argsort(places, dim=1) if fault == "order for places" else places
    total = torch.stack([one[:, at] for one, at in zip(y, steps, strict=True)]).sum(0)
    if gate is not None:
        total = total * (torch.sigmoid(gate) if fault == "sigmoid" else silu(gate))
    return total, y * (0 if fault == "directions lost" else 1)


def begun(x: Tensor, *, places: Tensor) -> Tensor:
    return torch.stack([x[:, torch.argsort(at)] for at in places])


def bound_of(dtype: torch.dtype, terms: int) -> float:
    """A sum of some terms and a handful of operations in fp32, then a rounding of the output and one of the sum that is
    kept, twice as far in the interpreter, which cuts bf16 off.
    """
    exact = 2**-24 * (16 + terms)
    return exact if dtype == torch.float32 else 4 * rounding(dtype) + exact


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_fp64_they_are_the_formulas(shape: tuple[int, ...], gate: bool) -> None:
    inputs, places = draw(shape, gate=gate), places_of(shape[0], shape[2])
    exact, exact_gradients = merged(**inputs, places=places), gradients(partial(merged, places=places), inputs)
    x = {"x": inputs["y"][0]}
    for backend in BACKENDS:
        run = partial(merge_scans, places=places, backend=backend)
        assert worst_error(run(**inputs), exact) < FP64_BOUND
        assert worst_error(gradients(run, inputs), exact_gradients) < FP64_BOUND
        begin = partial(begin_scans, places=places, backend=backend)
        assert relative_rms_error(begin(**x), begun(**x, places=places)) < FP64_BOUND
        assert worst_error(gradients(begin, x), gradients(partial(begun, places=places), x)) < FP64_BOUND
        assert torch.equal(begin(**x, in_order=False), x["x"].expand(shape))


def test_gradients_are_those_of_finite_differences() -> None:
    inputs, places = draw((3, 2, 4, 2)), places_of(3, 4)
    leaves = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(lambda y, gate: merge_scans_torch(y, places, gate), leaves)
    assert torch.autograd.gradcheck(lambda x: begin_scans_torch(x, places, True), (leaves[1],))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_agree_in_values_and_gradients(shape: tuple[int, ...], gate: bool, dtype: torch.dtype) -> None:
    inputs, places = draw(shape, gate=gate, dtype=dtype), places_of(shape[0], shape[2])
    run, exact = (partial(op, places=places) for op in (partial(merge_scans, backend="triton"), merged))
    bound = bound_of(dtype, shape[0])
    found = run(**inputs)
    assert found[0].dtype == dtype
    assert worst_error(found, exact(**in_double(inputs))) < bound
    assert worst_error(gradients(run, inputs), gradients(exact, in_double(inputs))) < bound
    x = {"x": inputs["y"][0]}
    for in_order in (True, False):
        steps = places if in_order else torch.arange(shape[2], device=DEVICE).expand(places.shape)
        begin = partial(begin_scans, places=places, in_order=in_order, backend="triton")
        assert torch.equal(begin(**x), begun(**x, places=steps))
        assert worst_error(gradients(begin, x), gradients(partial(begun, places=steps), in_double(x))) < bound


@needs_triton
@pytest.mark.parametrize("which", ["merged", "directions", "both"])
def test_the_directions_may_be_read_as_well(which: str) -> None:
    """The gradient of either output alone, and of both, which are added in one pass."""
    inputs, places = draw((2, 3, 5, 8), dtype=torch.float32), places_of(2, 5)

    def chosen(op: Any, y: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        total, same = op(y, gate=gate, places=places)
        return {"merged": (total,), "directions": (same,), "both": (total, same.flip(0))}[which]

    found = gradients(partial(chosen, partial(merge_scans, backend="triton")), inputs)
    assert worst_error(found, gradients(partial(chosen, merged), in_double(inputs))) < bound_of(torch.float32, 2)


@needs_triton
def test_the_kernels_read_rows_that_lie_apart() -> None:
    wide, places = torch.randn(2, 3, 6, 40, device=DEVICE), places_of(2, 5)
    y, gate = wide[:, :, 1:, :16], wide[0, :, :5, 16:32]
    exact = merged(y.double(), gate.double(), places=places)
    assert worst_error(merge_scans(y, places, gate, backend="triton"), exact) < bound_of(torch.float32, 2)
    columns = wide[0, :, 1:, ::2]
    found = begin_scans(columns, places, backend="triton")
    assert torch.equal(found, begun(columns, places=places))


@needs_triton
def test_the_kernels_are_registered_ops() -> None:
    from transmamba.ops.merge_scans.triton import begin_scans_op, merge_scans_op

    inputs, places = draw((2, 3, 5, 8), dtype=torch.float32), places_of(2, 5)
    y, gate = (x.requires_grad_() for x in inputs.values())
    for given in (None, gate):
        torch.library.opcheck(merge_scans_op, (y, places, given, True))
    torch.library.opcheck(begin_scans_op, (gate, places, True))


@pytest.mark.parametrize("fault", ["order for places", "sigmoid", "directions lost"])
def test_the_bounds_see_a_fault(fault: str) -> None:
    inputs, places = draw((3, 2, 11, 8)), places_of(3, 11)
    wrong, exact = merged(**inputs, places=places, fault=fault), merged(**inputs, places=places)
    assert worst_error(wrong, exact) > FAULT_FACTOR * bound_of(torch.bfloat16, 3)


def test_what_does_not_fit_is_one_line() -> None:
    y, places = torch.zeros(2, 3, 5, 4), places_of(2, 5).cpu()
    with pytest.raises(InputError, match=r"merge_scans: y has shape \(3, 5, 4\)"):
        merge_scans(y[0], places)
    with pytest.raises(InputError, match=r"places has shape \(2, 4\), .*; give \(2, 5\), \(directions, patches\)"):
        merge_scans(y, places[:, :4])
    with pytest.raises(InputError, match=r"gate has shape \(3, 5\) and y \(2, 3, 5, 4\); give \(3, 5, 4\)"):
        merge_scans(y, places, y[0, ..., 0])
    with pytest.raises(InputError, match=r"begin_scans: x has shape \(2, 3, 5, 4\)"):
        begin_scans(y, places)
    with pytest.raises(InputError, match="begin_scans: x holds NaN"):
        begin_scans(y[0] + float("nan"), places)
