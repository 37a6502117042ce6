"""gated_rms_norm on a GPU: a kernel forward and one backward, which computes SiLU again.

torch.compile sees one node for each; a plain call in eager mode goes to the same functions without the registration.
"""

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.ops.launching import launch, on_its_device, readable, way_to_call

from . import kernels

BLOCK = (8, 256)  # tokens and columns of a program, for the gate alone
NORM_BLOCK = 2048  # entries of a program that holds whole rows, where a row has no more
MAX_SIZE = 8192  # of a row; backward, registers hold no more
PARTS = 1024  # of the weight's gradient, about: so many programs fill a card
MAX_STEPS = 16
_INPUTS = "Tensor x, Tensor gate, Tensor? weight"


def gated_rms_norm_triton(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, start: int) -> Tensor:
    """Return y; see gated_rms_norm."""
    inputs = (_as_rows(x), _as_rows(gate), weight, float(eps), start)
    y, *_ = way_to_call(gated_rms_norm_op, _GatedNorm, run, x, gate, weight)(*inputs)
    return y.view(x.shape)


@on_its_device
def run(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, start: int) -> tuple[Tensor, Tensor]:
    """(y, 1 / sqrt(mean + eps) of each row); x and gate (batch, tokens, size)."""
    x, gate, has_norm = readable(x), readable(gate), weight is not None
    y, inverse = x.new_empty(x.shape), x.new_empty(x.shape[:2] if has_norm else (0,), dtype=torch.float32)
    if y.numel():
        batch, tokens, size = x.shape
        block_t, block_c, constants = _blocks(size, has_norm, 512)
        blocks = -(-tokens // block_t)
        weight = x if weight is None else weight.contiguous()
        numbers = (tokens, size, start, blocks, *x.stride()[:2], *gate.stride()[:2], eps)
        grid = (batch * blocks, -(-size // block_c), 1)
        launch(kernels.forward_kernel, grid, (x, gate, weight, y, inverse), numbers, constants)
    return y, inverse


@on_its_device
def run_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, inverse: Tensor, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dgate, dweight); the last is empty without a weight."""
    dy, x, gate, has_norm = readable(dy), readable(x), readable(gate), weight is not None
    dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    batch, tokens, size = x.shape
    if not x.numel():
        return dx, dgate, x.new_empty(0) if weight is None else torch.zeros_like(weight)
    block_t, block_c, constants = _blocks(size, has_norm, 256 if has_norm else 512)
    steps = max(1, min(MAX_STEPS, batch * tokens // (block_t * PARTS))) if has_norm else 1
    blocks = -(-tokens // (block_t * steps))
    parts = x.new_empty(batch * blocks if has_norm else 0, size, dtype=torch.float32)
    tensors = (dy, x, gate, x if weight is None else weight.contiguous(), inverse, dx, dgate, parts)
    strides = (*dy.stride()[:2], *x.stride()[:2], *gate.stride()[:2])
    numbers = (tokens, size, start, blocks, steps, *strides)
    launch(kernels.backward_kernel, (batch * blocks, -(-size // block_c), 1), tensors, numbers, constants)
    return dx, dgate, x.new_empty(0) if weight is None else parts.sum(0).to(weight.dtype)


gated_rms_norm_op = torch.library.custom_op(
    "transmamba::gated_rms_norm",
    lambda *inputs: run(*inputs),
    mutates_args=(),
    schema=f"({_INPUTS}, float eps, int start) -> (Tensor, Tensor)",
)


@gated_rms_norm_op.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, start: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((0,) if weight is None else x.shape[:2], dtype=torch.float32)


gated_rms_norm_backward_op = torch.library.custom_op(
    "transmamba::gated_rms_norm_backward",
    lambda *inputs: run_backward(*inputs),
    mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}, Tensor inverse, int start) -> (Tensor, Tensor, Tensor)",
)


@gated_rms_norm_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor | None, inverse: Tensor, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        gate.new_empty(gate.shape),
        (x if weight is None else weight).new_empty((0,) if weight is None else weight.shape),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate, weight, _, ctx.start = inputs
    ctx.save_for_backward(x, gate, weight, output[1])


def _gradients(run_backward: Any, ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: each reading may be a computation
    dx, dgate, dweight = run_backward(dy, *saved, ctx.start)
    return dx, dgate, None if saved[2] is None else dweight, None, None


gated_rms_norm_op.register_autograd(partial(_gradients, gated_rms_norm_backward_op), setup_context=_keep)


class _GatedNorm(torch.autograd.Function):
    """The same gradients without the registration."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor]:
        output = run(*inputs)
        _keep(ctx, inputs, output)
        return output[:1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _gradients(run_backward, ctx, dy)


def _as_rows(x: Tensor) -> Tensor:
    """(..., tokens, size) as (batch, tokens, size)."""
    return x.flatten(0, -3) if x.dim() > 3 else x[(None,) * (3 - x.dim())]


def _blocks(size: int, has_norm: bool, per_warp: int) -> tuple[int, int, dict[str, Any]]:
    """Tokens and columns of a program, and the constants of its kernel, with so many entries per warp."""
    block_t, block_c = BLOCK
    if has_norm:
        block_c = triton.next_power_of_2(size)
        block_t = max(1, NORM_BLOCK // block_c)
    warps = max(1, min(32, block_t * block_c // per_warp))
    constants = {"NORM": has_norm, "BLOCK_T": block_t, "BLOCK_C": block_c, "num_warps": warps, "num_stages": 2}
    return block_t, block_c, constants
