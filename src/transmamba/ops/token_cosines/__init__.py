"""token_cosines: how near features are to tokens, each to the one it belongs to, neither's mean nor scale counting."""

from torch import Tensor, float64, int64

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_finite, check_tensors, values_are_checked
from transmamba.ops.precision import outside_autocast

from .reference import token_cosines_reference
from .torch import Cosine, standardised, token_cosines_torch

__all__ = ["Cosine", "standardised", "token_cosines", "token_cosines_reference", "token_cosines_torch"]


@outside_autocast
def token_cosines(x: Tensor, y: Tensor, places: Tensor, *, validate: bool = True, backend: str | None = None) -> Tensor:
    """Return the cosines of x_mbt and y_b[places_mt], both standardised, (directions, batch, steps), fp32 (fp64 of
    fp64).

    x (directions, batch, steps, width)    y (batch, tokens, width)    places (directions, steps), int64
    Standardised: layer norm without parameters. Gradients reach x alone. Raises InputError.
    """
    op = "token_cosines"
    if x.dim() != 4 or y.dim() != 3 or y.shape[0] != x.shape[1] or y.shape[2] != x.shape[3]:
        raise InputError(
            f"{op}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; give (directions, batch, steps, width) and "
            "(batch, tokens, width)."
        )
    wanted = (x.shape[0], x.shape[2])
    if tuple(places.shape) != wanted or places.dtype != int64 or places.device != x.device:
        raise InputError(
            f"{op}: places has shape {tuple(places.shape)}, dtype {places.dtype} and device {places.device}; give "
            f"{wanted}, (directions, steps), int64, on {x.device}."
        )
    check_tensors(op, {"x": x, "y": y})
    if validate and values_are_checked(x):
        check_finite(op, {"x": x, "y": y})
    y = y.detach()
    narrow = x if y.dtype != float64 else y  # fp64 on either side is for plain PyTorch
    name = resolve_backend(op, backend, narrow, size=0)
    if name == "triton":
        from .triton import MAX_SIZE, token_cosines_triton

        if x.shape[3] <= MAX_SIZE:
            return token_cosines_triton(x, y, places)
        if backend is not None:
            raise InputError(
                f"{op} has no kernel for {x.shape[3]} columns, at most {MAX_SIZE}; pass backend='torch', or None."
            )
    return (token_cosines_reference if name == "reference" else token_cosines_torch)(x, y, places)
