"""hybrid_mixer in plain PyTorch: each mode computes its own positions only, the Memory Converter hands over."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from transmamba.ops.heads import expand_heads
from transmamba.ops.memory_converter.torch import memory_converter_torch
from transmamba.ops.recomputation import join, pick, recomputed
from transmamba.ops.rotary import apply_rotary, rotate
from transmamba.ops.softmax_attention.torch import softmax_attention_torch
from transmamba.ops.split import split_documents
from transmamba.ops.ssd_scan.torch import ssd_scan_torch


def hybrid_mixer_torch(
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
    """Return (y, final state or None); see hybrid_mixer."""
    longest = q.shape[1] if cu_seqlens is None else max(b - a for a, b in pairwise(cu_seqlens))
    if trans_point is None or trans_point >= longest:
        y = attention_mode(q, k, v, dt, rotary, cu_seqlens)
        state = memory_converter_torch(k, v, dt, A, cu_seqlens=cu_seqlens) if return_final_state else None
        return y, state
    if trans_point == 0:
        return recomputed(ssd_scan_torch, q, k, v, dt, A, D, cu_seqlens=cu_seqlens)
    if cu_seqlens is None:
        before, after = slice(None, trans_point), slice(trans_point, None)
        y_attention = attention_mode(
            q[:, before], k[:, before], v[:, before], dt, rotary_at(rotary, before), None, beside_scan=True
        )
        state = memory_converter_torch(k[:, before], v[:, before], dt[:, before], A)
        y_ssm, state = recomputed(
            ssd_scan_torch, q[:, after], k[:, after], v[:, after], dt[:, after], A, D, initial_state=state
        )
        return recomputed(join, y_attention, y_ssm, dim=1), state

    split = split_documents(tuple(cu_seqlens), trans_point, q.device)
    q_s, k_s, v_s, dt_s = (tokens_at(x, split.prefix) for x in (q, k, v, dt))
    y_attention = attention_mode(
        q_s, k_s, v_s, dt_s, rotary_at(rotary, split.prefix), split.prefix_borders, beside_scan=True
    )
    state = memory_converter_torch(k_s, v_s, dt_s, A, cu_seqlens=split.prefix_borders)
    q_l, k_l, v_l, dt_l = (tokens_at(x, split.suffix) for x in (q, k, v, dt))
    y_ssm, state = recomputed(
        ssd_scan_torch, q_l, k_l, v_l, dt_l, A, D, initial_state=state, cu_seqlens=split.suffix_borders
    )
    return tokens_at(recomputed(join, y_attention, y_ssm, dim=1), split.merge), state


def attention_mode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    cu_seqlens: Sequence[int] | None,
    *,
    beside_scan: bool = False,
) -> Tensor:
    """Rotate, attend, and give the output as many heads as the SSM's (dt may have more than q, k and v).

    beside_scan: q and k are kept whole for a scan of other tokens, so that what is rotated need not be.
    """
    if rotary is not None:
        q, k = (recomputed(apply_rotary, x, *rotary) if beside_scan else rotate(x, *rotary) for x in (q, k))
    y = softmax_attention_torch(q, k, v, cu_seqlens=cu_seqlens)
    return expand_heads(y, max(y.shape[2], dt.shape[2]), dim=2)


def tokens_at(x: Tensor, index: Tensor) -> Tensor:
    """x[:, index], a copy that is not kept where x is."""
    return recomputed(pick, x, (slice(None), index))


def rotary_at(rotary: tuple[Tensor, Tensor] | None, index: slice | Tensor) -> tuple[Tensor, Tensor] | None:
    return None if rotary is None else (rotary[0][..., index, :], rotary[1][..., index, :])
