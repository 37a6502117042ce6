"""The specification of softmax_attention: one softmax per query, in whatever float dtype it is given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from transmamba.ops.heads import accumulation_dtype, expand_heads


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Sequence[int] | None = None,
    query_lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Return the attention output; see softmax_attention."""
    heads, dtype = max(q.shape[2], k.shape[2], v.shape[2]), accumulation_dtype(q)
    q_h, k_h, v_h = (expand_heads(x.to(dtype), heads, dim=2) for x in (q, k, v))
    rows = []
    for b in range(q.shape[0]):
        queries = q.shape[1] if query_lengths is None else query_lengths[b]
        keys = k.shape[1] if key_lengths is None else key_lengths[b]
        outputs = torch.zeros(q.shape[1], heads, v.shape[3], dtype=dtype, device=q.device)
        for i in range(queries):
            last = keys - queries + i
            first = 0 if cu_seqlens is None else max(border for border in cu_seqlens if border <= last)
            scores = torch.einsum("hn,jhn->hj", q_h[b, i], k_h[b, first : last + 1]) / q.shape[3] ** 0.5
            y = torch.einsum("hj,jhp->hp", scores.softmax(dim=-1), v_h[b, first : last + 1])
            outputs = outputs.index_put((torch.tensor(i, device=q.device),), y)
        rows.append(outputs)
    stacked = torch.stack(rows) if rows else torch.zeros(*q.shape[:2], heads, v.shape[3], dtype=dtype, device=q.device)
    return stacked.to(v.dtype)
