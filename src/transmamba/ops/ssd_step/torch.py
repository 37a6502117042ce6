"""ssd_step in plain PyTorch: two batched products, shared heads read in place."""

import torch
from torch import Tensor

from transmamba.ops.heads import accumulation_dtype, head_matmul, head_multiply


def ssd_step_torch(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (y, new state); see ssd_step."""
    dtype = accumulation_dtype(k)
    dt, A = dt.to(dtype), A.to(dtype)
    written = head_multiply(v.to(dtype), dt[..., None])
    decay = torch.exp(dt * A)[..., None, None]
    new_state = head_multiply(state.to(dtype), decay) + head_matmul(k.to(dtype)[..., None], written[:, :, None, :])
    y = head_matmul(q.to(dtype)[:, :, None, :], new_state)[:, :, 0]
    if D is not None:
        y = add_skip(y, v, D)
    return y.to(v.dtype), new_state


def add_skip(y: Tensor, v: Tensor, D: Tensor) -> Tensor:
    """y (..., heads, head_dim) + D v with v (..., v_heads, head_dim) in grouped-query order."""
    groups = v.shape[-2]
    y_g = y.unflatten(-2, (groups, y.shape[-2] // groups))
    return torch.addcmul(y_g, v.to(y.dtype).unsqueeze(-2), D.to(y.dtype).view(groups, -1, 1)).flatten(-3, -2)
