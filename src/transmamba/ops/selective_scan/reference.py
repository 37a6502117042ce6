"""The specification of selective_scan: Mamba-1's recurrence, token by token, in whatever float dtype it is given."""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from transmamba.ops.heads import accumulation_dtype


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, last state); see selective_scan."""
    dtype, dim = accumulation_dtype(u), u.shape[1]
    x, step, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    B, C = (_per_channel(given.to(dtype), dim) for given in (B, C))
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        step = softplus(step)
    state = x.new_zeros(*x.shape[:2], A.shape[1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(u.shape[2]):
        decay = torch.exp(step[:, :, t, None] * A)
        state = decay * state + step[:, :, t, None] * B[..., t] * x[:, :, t, None]
        outputs.append((C[..., t] * state).sum(-1))
    y = torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * silu(z.to(dtype))
    return y.to(u.dtype), state


def _per_channel(x: Tensor, dim: int) -> Tensor:
    """(batch, groups, state_size, seq_len) -> (batch, dim, state_size, seq_len)."""
    x = x.unsqueeze(1) if x.dim() == 3 else x
    return x.repeat_interleave(dim // x.shape[1], dim=1)
