"""The specification of one SSM step: the recurrence, in whatever float dtype it is given."""

import torch
from torch import Tensor

from transmamba.ops.heads import accumulation_dtype, expand_heads


def ssd_step_reference(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (y, new state); see ssd_step."""
    dtype = accumulation_dtype(k)
    state_heads = state.shape[1]
    heads = max(q.shape[1], state_heads)
    write = (expand_heads(x.to(dtype), state_heads, dim=1) for x in (k, v, dt))
    k_h, v_h, dt_h = write
    decay = torch.exp(dt_h * expand_heads(A.to(dtype), state_heads, dim=0))
    state = decay[..., None, None] * state.to(dtype) + torch.einsum("bh,bhn,bhp->bhnp", dt_h, k_h, v_h)
    y = torch.einsum("bhn,bhnp->bhp", expand_heads(q.to(dtype), heads, dim=1), expand_heads(state, heads, dim=1))
    if D is not None:
        y = y + D.to(dtype)[:, None] * expand_heads(v.to(dtype), heads, dim=1)
    return y.to(v.dtype), state
