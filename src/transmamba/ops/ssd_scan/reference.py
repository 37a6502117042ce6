"""The specification of ssd_scan: the recurrence, token by token, in whatever float dtype it is given."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from transmamba.ops.heads import accumulation_dtype, expand_heads
from transmamba.ops.ssd_step.reference import ssd_step_reference


def ssd_scan_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final state); see ssd_scan."""
    if cu_seqlens is not None:
        pieces = [
            ssd_scan_reference(
                q[:, start:end],
                k[:, start:end],
                v[:, start:end],
                dt[:, start:end],
                A,
                D,
                initial_state=None if initial_state is None else initial_state[i : i + 1],
            )
            for i, (start, end) in enumerate(pairwise(cu_seqlens))
        ]
        return torch.cat([y for y, _ in pieces], dim=1), torch.cat([state for _, state in pieces], dim=0)
    state_heads = max(k.shape[2], v.shape[2], dt.shape[2])
    heads = max(q.shape[2], state_heads)
    shape = (k.shape[0], state_heads, k.shape[3], v.shape[3])
    state = k.new_zeros(shape, dtype=accumulation_dtype(k)) if initial_state is None else initial_state
    state = state.to(accumulation_dtype(k))
    outputs = []
    for t in range(k.shape[1]):
        y, state = ssd_step_reference(state, q[:, t], k[:, t], v[:, t], dt[:, t], A, D)
        outputs.append(y)
    empty = expand_heads(v, heads, dim=2)
    return (torch.stack(outputs, dim=1) if outputs else empty), state
