"""residual_norm: the norm that a branch begins with, and the residual stream beside it, whose gradients meet here.

post_norm is the norm that follows a branch, of its sum with the stream.
"""

from torch import Tensor, promote_types
from torch import dtype as DType

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_finite, check_tensors, values_are_checked
from transmamba.ops.precision import outside_autocast

from .reference import post_norm_reference, residual_norm_reference
from .torch import post_norm_torch, residual_norm_torch

__all__ = [
    "post_norm",
    "post_norm_reference",
    "post_norm_torch",
    "residual_norm",
    "residual_norm_reference",
    "residual_norm_torch",
]


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
    _check(op, {"x": x}, weight, bias, validate)
    dtype = x.dtype if dtype is None else dtype
    name = _backend(op, backend, x)
    if name == "triton":
        from .triton import residual_norm_triton

        return residual_norm_triton(x, weight, bias, eps, centred, dtype)
    implementation = residual_norm_reference if name == "reference" else residual_norm_torch
    return implementation(x, weight, bias, eps, centred, dtype)


@outside_autocast
def post_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    centred: bool = True,
    dtype: DType | None = None,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Return the layer norm of x + branch in dtype; without centred the RMS norm. dtype None = that of the sum.

    x, branch (..., size)    weight, bias (size,)
    Raises InputError.
    """
    op = "post_norm"
    if branch.shape != x.shape:
        raise InputError(f"{op}: branch has shape {tuple(branch.shape)} and x {tuple(x.shape)}; give both alike.")
    _check(op, {"x": x, "branch": branch}, weight, bias, validate)
    wider = promote_types(x.dtype, branch.dtype)
    dtype = wider if dtype is None else dtype
    name = _backend(op, backend, branch if branch.dtype == wider else x)  # fp64 on either side is for plain PyTorch
    if name == "triton":
        from .triton import post_norm_triton

        return post_norm_triton(x, branch, weight, bias, eps, centred, dtype)
    implementation = post_norm_reference if name == "reference" else post_norm_torch
    return implementation(x, branch, weight, bias, eps, centred, dtype)


def _check(op: str, given: dict[str, Tensor], weight: Tensor, bias: Tensor | None, validate: bool) -> None:
    x = given["x"]
    size = x.shape[-1] if x.dim() else 0
    for name, one in (("weight", weight), ("bias", bias)):
        if one is not None and tuple(one.shape) != (size,):
            raise InputError(f"{op}: {name} has shape {tuple(one.shape)} and x {tuple(x.shape)}; give ({size},).")
    tensors = given | {"weight": weight} | ({} if bias is None else {"bias": bias})
    check_tensors(op, tensors)
    if validate and values_are_checked(x):
        check_finite(op, tensors)


def _backend(op: str, backend: str | None, x: Tensor) -> str:
    name = resolve_backend(op, backend, x, size=0)
    if name == "triton":
        from .triton import MAX_SIZE

        if x.shape[-1] > MAX_SIZE:
            if backend is None:
                return "torch"
            raise InputError(
                f"{op} has no kernel for {x.shape[-1]} columns, at most {MAX_SIZE}; pass backend='torch', or None."
            )
    return name
