"""gated_rms_norm: x * silu(gate), and its RMS norm where a weight is given; without one, the middle of SwiGLU."""

from torch import Tensor

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_finite, check_tensors, values_are_checked
from transmamba.ops.precision import outside_autocast

from .reference import gated_rms_norm_reference
from .torch import gated_rms_norm_torch

__all__ = ["gated_rms_norm", "gated_rms_norm_reference", "gated_rms_norm_torch"]


@outside_autocast
def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    start: int = 0,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Return y = x silu(gate), and of it y / sqrt(mean(y^2) + eps) weight, the mean over a row; y is like x.

    x (..., seq_len, size)    gate (..., seq_len - start, size)    weight (size,), or None: the gate alone
    start: tokens before it pass as they are, and have no gate. Rows may lie apart in memory. Raises InputError.
    """
    op = "gated_rms_norm"
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise InputError(f"{op}: start is {start!r}; give a whole number >= 0.")
    if x.dim() < (2 if start else 1) or (start and start > x.shape[-2]):
        raise InputError(f"{op}: x has shape {tuple(x.shape)} and start is {start}; give (..., seq_len, size).")
    wanted = (*x.shape[:-2], x.shape[-2] - start, x.shape[-1]) if start else tuple(x.shape)
    if tuple(gate.shape) != wanted:
        raise InputError(f"{op}: gate has shape {tuple(gate.shape)} and x {tuple(x.shape)}; give {wanted}.")
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise InputError(f"{op}: weight has shape {tuple(weight.shape)}; give ({x.shape[-1]},), or None.")
    given = {"x": x, "gate": gate} | ({} if weight is None else {"weight": weight})
    check_tensors(op, given)
    if validate and values_are_checked(x):
        check_finite(op, given)
    name = resolve_backend(op, backend, x, size=0)
    if name == "triton":
        from .triton import MAX_SIZE, gated_rms_norm_triton

        if weight is None or x.shape[-1] <= MAX_SIZE:
            return gated_rms_norm_triton(x, gate, weight, eps, start)
        if backend is not None:
            raise InputError(
                f"{op} has no kernel for the norm of {x.shape[-1]} columns, at most {MAX_SIZE}; "
                "pass backend='torch', or None."
            )
    implementation = gated_rms_norm_reference if name == "reference" else gated_rms_norm_torch
    return implementation(x, gate, weight, eps, start)
