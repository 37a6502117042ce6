"""Head counts that differ between tensors, without repeating anything in memory.

Every op reads head h of a tensor with `count` heads at index h * count // heads (grouped-query order). Two tensors
whose counts nest (one divides the other) multiply as reshaped batches, so the smaller one is read in place. Layout
inside the ops: (batch, heads, rows, columns).
"""

import math

import torch
from torch import Tensor


def head_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product per head: left (batch, a, m, i), right (batch, b, i, n) -> (batch, max(a, b), m, n)."""
    left, right = nested_heads(left, right)
    batch, a, m, inner = left.shape
    b, n = right.shape[1], right.shape[3]
    if a == b:
        return left @ right
    if a > b:
        return (left.reshape(batch, b, (a // b) * m, inner) @ right).reshape(batch, a, m, n)
    repeats = b // a
    wide = right.reshape(batch, a, repeats, inner, n).transpose(2, 3).reshape(batch, a, inner, repeats * n)
    return (left @ wide).reshape(batch, a, m, repeats, n).transpose(2, 3).reshape(batch, b, m, n)


def head_multiply(left: Tensor, right: Tensor) -> Tensor:
    """Elementwise product per head: (batch, a, ...) and (batch, b, ...) -> (batch, max(a, b), ...).

    Trailing dimensions broadcast.
    """
    left, right = nested_heads(left, right)
    a, b = left.shape[1], right.shape[1]
    if a == b:
        return left * right
    if a < b:
        left, right, a, b = right, left, b, a
    return (left.unflatten(1, (b, a // b)) * right.unsqueeze(2)).flatten(1, 2)


def expand_heads(x: Tensor, heads: int, dim: int) -> Tensor:
    """Repeat the heads of x (at `dim`) up to `heads`: for references, and for counts that do not nest."""
    count = x.shape[dim]
    return x if count == heads else x.repeat_interleave(heads // count, dim=dim)


def nested_heads(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pair with head counts of which one divides the other (2 and 3 become 6 and 3)."""
    a, b = left.shape[1], right.shape[1]
    if a % b == 0 or b % a == 0:
        return left, right
    return expand_heads(left, math.lcm(a, b), dim=1), right


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for everything else: dt, decays, cumulative sums and states never live in 16 bits."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
