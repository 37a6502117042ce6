"""residual_norm: the norm that a branch begins with, and the residual stream beside it, whose gradients meet here."""

from torch import Tensor
from torch import dtype as DType

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_finite, check_tensors, values_are_checked
from transmamba.ops.precision import outside_autocast

from .reference import residual_norm_reference
from .torch import residual_norm_torch

__all__ = ["residual_norm", "residual_norm_reference", "residual_norm_torch"]


@outside_autocast
def residual_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    centred: bool = True,
    dtype: DType | None = None,
    validate: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (the layer norm of x in dtype, x as it came); without centred the RMS norm. dtype None = that of x.

    x (..., size)    weight, bias (size,)
    Who adds the branch to x should add it to the x that is returned: both gradients are then added while they are
    written. Raises InputError.
    """
    op = "residual_norm"
    size = x.shape[-1] if x.dim() else 0
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and tuple(given.shape) != (size,):
            raise InputError(f"{op}: {name} has shape {tuple(given.shape)} and x {tuple(x.shape)}; give ({size},).")
    tensors = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_tensors(op, tensors)
    if validate and values_are_checked(x):
        check_finite(op, tensors)
    dtype = x.dtype if dtype is None else dtype
    name = resolve_backend(op, backend, x, size=0)
    if name == "triton":
        from .triton import MAX_SIZE, residual_norm_triton

        if size <= MAX_SIZE:
            return residual_norm_triton(x, weight, bias, eps, centred, dtype)
        if backend is not None:
            raise InputError(
                f"{op} has no kernel for {size} columns, at most {MAX_SIZE}; pass backend='torch', or None."
            )
    implementation = residual_norm_reference if name == "reference" else residual_norm_torch
    return implementation(x, weight, bias, eps, centred, dtype)
