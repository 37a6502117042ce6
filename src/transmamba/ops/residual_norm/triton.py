"""residual_norm and post_norm on a GPU: a kernel forward, and one backward that computes the norm again.

torch.compile sees one node for each; a plain call in eager mode goes to the same functions without the registration.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.ops.launching import goes_around_registration, launch, on_its_device, readable, way_to_call, whole_rows

from . import kernels

BLOCK_ENTRIES = 2048  # of a program at a time
MAX_SIZE = 8192  # of a row; backward, registers hold no more
PARTS = 1024  # of the weight's gradient, about: so many programs fill a card
MAX_STEPS = 16


def residual_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (the norm, x); see residual_norm."""
    if not goes_around_registration(x, weight, bias):
        return residual_norm_op(x, None, weight, bias, float(eps), centred, dtype), x
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, weight, bias)):
        return _ResidualNorm.apply(x, None, weight, bias, float(eps), centred, dtype)
    return run(x, None, weight, bias, float(eps), centred, dtype), x


def post_norm_triton(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: torch.dtype
) -> Tensor:
    """Return the norm of the sum; see post_norm."""
    way = way_to_call(residual_norm_op, _PostNorm, run, x, branch, weight, bias)
    return way(x, branch, weight, bias, float(eps), centred, dtype)


@on_its_device
def run(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The norm of x, or of x + branch, dense."""
    rows = _rows(x)
    other = rows if branch is None else _rows(branch)
    y = x.new_empty(x.shape, dtype=dtype)
    if y.numel():
        block, constants = whole_rows(rows.shape[1], BLOCK_ENTRIES)
        weight = weight.contiguous()
        launch(
            kernels.norm_kernel,
            (-(-len(rows) // block), 1, 1),
            (rows, other, weight, weight if bias is None else bias.contiguous(), y),
            (*rows.shape, rows.stride(0), other.stride(0), eps),
            {"CENTRED": centred, "BRANCH": branch is not None, "BIAS": bias is not None, **constants},
        )
    return y


@on_its_device
def run_backward(
    dy: Tensor,
    more: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    has_bias: bool,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, with `more` added to it, in the wider dtype of x and branch; the gradients of weight and bias
    (1 or 2, size), fp32).
    """
    given, gradient = _rows(x), _rows(dy)
    dx, count = x.new_empty(x.shape, dtype=_wider(x, branch)), 2 if has_bias else 1
    if not x.numel():
        return dx, x.new_zeros(count, x.shape[-1], dtype=torch.float32)
    block, constants = whole_rows(given.shape[1], BLOCK_ENTRIES)
    steps = max(1, min(MAX_STEPS, len(given) // (block * PARTS)))
    programs = -(-len(given) // (block * steps))
    parts = x.new_empty(programs, count, given.shape[1], dtype=torch.float32)
    added, other = given if branch is None else _rows(branch), gradient if more is None else _rows(more)
    launch(
        kernels.norm_backward_kernel,
        (programs, 1, 1),
        (gradient, given, added, weight.contiguous(), other, dx, parts),
        (*given.shape, steps, *(one.stride(0) for one in (gradient, given, added, other)), eps),
        {"CENTRED": centred, "BRANCH": branch is not None, "BIAS": has_bias, "MORE": more is not None, **constants},
    )
    return dx, parts.sum(0)


def _rows(x: Tensor) -> Tensor:
    """(..., size) as (rows, size) with neighbours in a row neighbours in memory."""
    return readable(x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1]))


def _wider(x: Tensor, branch: Tensor | None) -> torch.dtype:
    return x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)


residual_norm_op = torch.library.custom_op(
    "transmamba::residual_norm",
    lambda *inputs: run(*inputs),
    mutates_args=(),
    schema="(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, float eps, bool centred, ScalarType dtype) -> "
    "Tensor",
)
residual_norm_backward_op = torch.library.custom_op(
    "transmamba::residual_norm_backward",
    lambda *inputs: run_backward(*inputs),
    mutates_args=(),
    schema="(Tensor dy, Tensor? more, Tensor x, Tensor? branch, Tensor weight, bool has_bias, float eps, bool centred)"
    " -> (Tensor, Tensor)",
)


@residual_norm_op.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@residual_norm_backward_op.register_fake
def _(
    dy: Tensor,
    more: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    has_bias: bool,
    eps: float,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape, dtype=_wider(x, branch))
    return dx, x.new_empty(2 if has_bias else 1, x.shape[-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, branch, weight, bias, ctx.eps, ctx.centred, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, branch, weight, bias)


def _gradients(run_backward: Any, ctx: Any, dy: Tensor | None, more: Tensor | None) -> tuple[Any, ...]:
    x, branch, weight, bias = ctx.saved_tensors
    if dy is None:
        return more, None, None, None, None, None, None
    dx, both = run_backward(dy, more, x, branch, weight, bias is not None, ctx.eps, ctx.centred)
    dbranch = None if branch is None else dx.to(branch.dtype)
    dbias = None if bias is None else both[1].to(bias.dtype)
    return dx.to(x.dtype), dbranch, both[0].to(weight.dtype), dbias, None, None, None


residual_norm_op.register_autograd(
    lambda ctx, dy: _gradients(residual_norm_backward_op, ctx, dy, None), setup_context=_keep
)


class _ResidualNorm(torch.autograd.Function):
    """The same gradients without the registration, and x handed on, so that what comes back to it is added here."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        y = run(*inputs)
        _keep(ctx, inputs, y)
        return y, inputs[0].view_as(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return _gradients(run_backward, ctx, *gradients)


class _PostNorm(torch.autograd.Function):
    """The same of a sum, which is not kept."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = run(*inputs)
        _keep(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return _gradients(run_backward, ctx, gradients[0], None)
