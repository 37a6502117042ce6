"""merge_scans: several scans of one image put back where their patches lie, added up and gated; begin_scans is the way
there, each the other's gradient.
"""

from torch import Tensor

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_finite, check_tensors, values_are_checked
from transmamba.ops.precision import outside_autocast

from .reference import begin_scans_reference, merge_scans_reference
from .torch import begin_scans_torch, merge_scans_torch

__all__ = [
    "begin_scans",
    "begin_scans_reference",
    "begin_scans_torch",
    "merge_scans",
    "merge_scans_reference",
    "merge_scans_torch",
]


@outside_autocast
def merge_scans(
    y: Tensor, places: Tensor, gate: Tensor | None = None, *, validate: bool = True, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return (merged, y): merged_bp = sum_m y_mb[places_mp], times silu(gate_bp) if there is one; and y as it came.

    y (directions, batch, patches, width)    places (directions, patches), int64: the step at which a direction visits
    a patch, a permutation of the patches in each row    gate, merged (batch, patches, width)
    Who also reads y itself should read the y that is returned: both gradients are then added while they are written.
    Raises InputError.
    """
    op = "merge_scans"
    if y.dim() != 4:
        raise InputError(f"{op}: y has shape {tuple(y.shape)}; give (directions, batch, patches, width).")
    _check_places(op, places, y, (y.shape[0], y.shape[2]))
    if gate is not None and gate.shape != y.shape[1:]:
        raise InputError(f"{op}: gate has shape {tuple(gate.shape)} and y {tuple(y.shape)}; give {tuple(y.shape[1:])}.")
    given = {"y": y} | ({} if gate is None else {"gate": gate})
    check_tensors(op, given, same_dtype=tuple(given))
    if validate and values_are_checked(y):
        check_finite(op, given)
    name = resolve_backend(op, backend, y, size=0)
    if name == "triton":
        from .triton import merge_scans_triton

        return merge_scans_triton(y, places, gate)
    return (merge_scans_reference if name == "reference" else merge_scans_torch)(y, places, gate)


@outside_autocast
def begin_scans(
    x: Tensor, places: Tensor, *, in_order: bool = True, validate: bool = True, backend: str | None = None
) -> Tensor:
    """Return u with u_mb[places_mp] = x_bp: every direction's own order of the patches of x.

    x (batch, patches, width)    places as in merge_scans    u (directions, batch, patches, width)
    in_order: False = u_mb = x_b, for what a scan reads as it lies.
    The backend is that of merge_scans. Raises InputError.
    """
    op = "begin_scans"
    if x.dim() != 3:
        raise InputError(f"{op}: x has shape {tuple(x.shape)}; give (batch, patches, width).")
    _check_places(op, places, x, (places.shape[0], x.shape[1]))
    check_tensors(op, {"x": x})
    if validate and values_are_checked(x):
        check_finite(op, {"x": x})
    name = resolve_backend("merge_scans", backend, x, size=0)
    if name == "triton":
        from .triton import begin_scans_triton

        return begin_scans_triton(x, places, in_order)
    return (begin_scans_reference if name == "reference" else begin_scans_torch)(x, places, in_order)


def _check_places(op: str, places: Tensor, x: Tensor, wanted: tuple[int, int]) -> None:
    if tuple(places.shape) != wanted or places.is_floating_point() or places.device != x.device:
        raise InputError(
            f"{op}: places has shape {tuple(places.shape)}, dtype {places.dtype} and device {places.device}; give "
            f"{wanted}, (directions, patches), int64, on {x.device}."
        )
