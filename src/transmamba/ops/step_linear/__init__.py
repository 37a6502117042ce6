"""step_linear: the products of a few rows with weights, and what stands around them, for decoding."""

from collections.abc import Sequence

from torch import Tensor

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_tensors
from transmamba.ops.precision import outside_autocast

from .reference import step_linear_reference
from .torch import step_linear_torch

__all__ = ["step_linear", "step_linear_reference", "step_linear_torch"]

_KERNEL_ROWS = 16  # beyond, the library's own products are as fast, and None takes them


@outside_autocast
def step_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    gated: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Return x' W^T of every weight W, where x' is x, or its RMS norm: (rows, outputs of W) each, in x's dtype.

    With a few rows, decoding takes the time of reading weights once, and every further kernel costs as much as a small
    weight; so the norm before, the gate between and the sum behind are part of the product.

    Args:
        x: (rows, size).
        weights: one to five of them, (outputs, size) each, as nn.Linear keeps them, of x's dtype.
        norm_weight: (size,), x' = x / sqrt(mean(x^2) + eps) * norm_weight; None: x' = x.
        residual: (rows, outputs), added to the only output; or None.
        gated: of two weights of one shape, gate and up, return silu(x' gate^T) * (x' up^T) alone.
        backend: "reference" | "torch" | "triton" | None, which takes "triton" on CUDA devices for up to 16 rows. It has
            no gradient with "triton".

    Raises:
        InputError: shapes, dtypes or devices that break the contract.
    """
    op = "step_linear"
    if x.dim() != 2 or not 1 <= len(weights) <= 5:
        raise InputError(
            f"{op}: x has shape {tuple(x.shape)} and there are {len(weights)} weights; give (rows, size), 1 to 5."
        )
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
            raise InputError(f"{op}: a weight has shape {tuple(weight.shape)}; give (outputs, {x.shape[1]}), as x is.")
    if gated and (len(weights) != 2 or weights[0].shape != weights[1].shape):
        raise InputError(f"{op}: gated takes two weights of one shape, not {[tuple(w.shape) for w in weights]}.")
    if norm_weight is not None and tuple(norm_weight.shape) != (x.shape[1],):
        raise InputError(f"{op}: norm_weight has shape {tuple(norm_weight.shape)}; give ({x.shape[1]},), or None.")
    outputs = (x.shape[0], weights[0].shape[0])
    if residual is not None and (tuple(residual.shape) != outputs or (len(weights) > 1 and not gated)):
        raise InputError(f"{op}: residual has shape {tuple(residual.shape)}; give {outputs}, with one output only.")
    named = {"x": x} | {f"weight {i}": weight for i, weight in enumerate(weights)}
    optional = {
        name: given for name, given in (("norm_weight", norm_weight), ("residual", residual)) if given is not None
    }
    check_tensors(op, named | optional, same_dtype=tuple(named))
    name = resolve_backend(op, backend, x, size=0)
    if name == "triton":
        from .triton import MAX_ROWS, step_linear_triton

        if backend is not None and x.shape[0] > MAX_ROWS:
            raise InputError(
                f"{op} has no kernel for {x.shape[0]} rows, at most {MAX_ROWS}; pass backend='torch', or None."
            )
        if backend is not None or x.shape[0] <= _KERNEL_ROWS:
            return step_linear_triton(x, weights, norm_weight=norm_weight, eps=eps, residual=residual, gated=gated)
    implementation = step_linear_reference if name == "reference" else step_linear_torch
    return implementation(x, weights, norm_weight=norm_weight, eps=eps, residual=residual, gated=gated)
