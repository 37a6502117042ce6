"""The specification of hybrid_mixer: both modes over the whole sequence, and a choice per position."""

from collections.abc import Sequence

import torch
from torch import Tensor

from transmamba.ops.rotary import apply_rotary
from transmamba.ops.softmax_attention.reference import softmax_attention_reference
from transmamba.ops.ssd_scan.reference import ssd_scan_reference


def hybrid_mixer_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    trans_point: int | None,
    rotary: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Sequence[int] | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return (y, final state); see hybrid_mixer."""
    y_ssm, state = ssd_scan_reference(q, k, v, dt, A, D, cu_seqlens=cu_seqlens)
    q_r, k_r = (q, k) if rotary is None else (apply_rotary(x, *rotary) for x in (q, k))
    attended = softmax_attention_reference(q_r, k_r, v, cu_seqlens=cu_seqlens)
    y_attention = attended.repeat_interleave(y_ssm.shape[2] // attended.shape[2], dim=2)
    borders = torch.tensor([0, q.shape[1]] if cu_seqlens is None else cu_seqlens)
    position = torch.cat([torch.arange(int(n)) for n in borders.diff()]).to(q.device)
    before = torch.ones_like(position, dtype=torch.bool) if trans_point is None else position < trans_point
    return torch.where(before[:, None, None], y_attention, y_ssm), state
