"""The specification of attention_step: every query against the keys that its row holds."""

import torch
from torch import Tensor

from transmamba.ops.heads import accumulation_dtype, expand_heads


def attention_step_reference(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Return the attention output; see attention_step."""
    dtype, heads = accumulation_dtype(q), q.shape[1]
    rows = []
    for row, length in enumerate(lengths.tolist()):
        k, v = (expand_heads(x[row, :length].to(dtype), heads, dim=1) for x in (keys, values))
        scores = torch.einsum("hn,jhn->hj", q[row].to(dtype), k) / q.shape[2] ** 0.5
        rows.append(torch.einsum("hj,jhp->hp", scores.softmax(dim=-1), v))
    return torch.stack(rows).to(values.dtype) if rows else q.new_zeros(0, heads, values.shape[3])
