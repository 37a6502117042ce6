"""hybrid_mixer on a GPU: torch's attention on the prefix, our scan on the suffix, q, k and v read in place by both."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from transmamba.ops.launching import goes_around_registration
from transmamba.ops.memory_converter.triton import memory_converter_triton
from transmamba.ops.rooms import Rooms
from transmamba.ops.split import split_documents
from transmamba.ops.ssd_scan.triton import ssd_scan_triton

from .torch import attention_mode, rotary_at, tokens_at


def hybrid_mixer_triton(
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
        return y, memory_converter_triton(k, v, dt, A, cu_seqlens=cu_seqlens) if return_final_state else None
    if trans_point == 0:
        return ssd_scan_triton(q, k, v, dt, A, D, cu_seqlens=cu_seqlens)
    if cu_seqlens is None:
        # Not slices: the gradient of each would be a whole tensor of zeros.
        rooms = Rooms(trans_point) if goes_around_registration(q, k, v, dt) else None
        if rooms is None:
            pairs = [x.split((trans_point, x.shape[1] - trans_point), dim=1) for x in (q, k, v, dt)]
        else:
            pairs = rooms.split(q, k, v, dt)
        (q_s, q_l), (k_s, k_l), (v_s, v_l), (dt_s, dt_l) = pairs
        at = rotary_at(rotary, slice(None, trans_point))
        before = attention_mode(q_s, k_s, v_s, dt_s, at, None, beside_scan=True)
        state = memory_converter_triton(k_s, v_s, dt_s, A)
        return ssd_scan_triton(q_l, k_l, v_l, dt_l, A, D, initial_state=state, before=before, rooms=rooms)

    split = split_documents(tuple(cu_seqlens), trans_point, q.device)
    q_s, k_s, v_s, dt_s = (tokens_at(x, split.prefix) for x in (q, k, v, dt))
    at = rotary_at(rotary, split.prefix)
    before = attention_mode(q_s, k_s, v_s, dt_s, at, split.prefix_borders, beside_scan=True)
    state = memory_converter_triton(k_s, v_s, dt_s, A, cu_seqlens=split.prefix_borders)
    q_l, k_l, v_l, dt_l = (tokens_at(x, split.suffix) for x in (q, k, v, dt))
    y, state = ssd_scan_triton(
        q_l, k_l, v_l, dt_l, A, D, initial_state=state, before=before, cu_seqlens=split.suffix_borders
    )
    return tokens_at(y, split.merge), state
