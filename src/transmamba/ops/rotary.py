"""Rotary position embedding in the half-split convention of Llama (Su et al. 2021, arXiv 2104.09864)."""

from typing import Any

import torch
from torch import Tensor

from transmamba.ops.heads import accumulation_dtype
from transmamba.ops.recomputation import recomputed_like


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (batch, seq_len, heads, dim); cos and sin (seq_len, dim) or (batch, seq_len, dim), both halves alike."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    if _is_watched(x) or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin
    return _Rotation.apply(x, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """apply_rotary, computed again in backward where x is."""
    return recomputed_like(apply_rotary, x, cos, sin)


def undo_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Invert apply_rotary, also where cos and sin carry an attention scaling.

    The result is fp32 (fp64 for fp64 inputs), so that 16 bits round once.
    """
    dtype = accumulation_dtype(x)
    cos, sin = cos.to(dtype), sin.to(dtype)
    return apply_rotary(x.to(dtype), cos, -sin) / (cos.square() + sin.square()).unsqueeze(-2)


class _Rotation(torch.autograd.Function):
    """The rotation in three passes, of which two go over a half, instead of the formula's five; backward the same.

    cos and sin (..., seq_len, 1, dim), which get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = x * cos
        (first, second), (y_first, y_second) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
        sin_first, sin_second = sin.chunk(2, dim=-1)
        y_first.addcmul_(second, sin_first, value=-1)
        y_second.addcmul_(first, sin_second)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotation.apply(dy, cos, -sin), None, None


def _is_watched(x: Tensor) -> bool:
    """Whether someone wants to see each function: a compiler, which makes one pass of them, or a transform."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or type(x) is not Tensor
