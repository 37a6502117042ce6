"""Rotary position embedding in the half-split convention of Llama (Su et al. 2021, arXiv 2104.09864)."""

import torch
from torch import Tensor

from transmamba.ops.heads import accumulation_dtype


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (batch, seq_len, heads, dim); cos and sin (seq_len, dim) or (batch, seq_len, dim), both halves alike."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def undo_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Invert apply_rotary, also where cos and sin carry an attention scaling.

    The result is fp32 (fp64 for fp64 inputs), so that 16 bits round once.
    """
    dtype = accumulation_dtype(x)
    cos, sin = cos.to(dtype), sin.to(dtype)
    return apply_rotary(x.to(dtype), cos, -sin) / (cos.square() + sin.square()).unsqueeze(-2)
