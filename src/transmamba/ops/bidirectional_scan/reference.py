"""The specification of bidirectional_scan: every row by itself, forward, and turned around."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from transmamba.ops.causal_conv1d.reference import causal_conv1d_reference
from transmamba.ops.ssd_scan.reference import ssd_scan_reference


def bidirectional_scan_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    dt_bias: tuple[Tensor, Tensor],
    A_log: tuple[Tensor, Tensor],
    D: tuple[Tensor, Tensor],
    m: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    lengths: Tensor | None,
) -> Tensor:
    """Return y; see bidirectional_scan."""
    (batch, seq_len, width), heads = q.shape, D[0].shape[0]
    rows = []
    for row in range(batch):
        length = seq_len if lengths is None else int(lengths[row])
        qkv = torch.cat([q, k, v], dim=-1)[row, :length]
        total = qkv.new_zeros(length, width)
        for way in range(2):
            inputs = qkv.flip(0) if way else qkv
            if weight is not None:
                inputs = causal_conv1d_reference(inputs[None], weight, bias)[0][0]
            inputs = silu(inputs) if activation == "silu" else inputs
            queries, keys, values = (x.unflatten(-1, (heads, -1)) for x in inputs.chunk(3, dim=-1))
            queries = queries / queries.shape[-1] ** 0.5
            raw = dt[row, :length, way * heads : (way + 1) * heads]
            steps = torch.nn.functional.softplus((raw.flip(0) if way else raw) + dt_bias[way])
            if m is not None:
                means = (m[row, :length].flip(0) if way else m[row, :length])[..., None].to(keys.dtype)
                queries = torch.cat([queries, torch.ones_like(means)], dim=-1)
                keys = torch.cat([keys, means], dim=-1)
            queries, keys, values, steps = (x[None] for x in (queries, keys, values, steps))
            y = ssd_scan_reference(queries, keys, values, steps, -torch.exp(A_log[way]), D[way])[0][0].flatten(1)
            total = total + (y.flip(0) if way else y)
        if gate is not None:
            total = total * silu(gate[row, :length])
        rows.append(torch.cat([total, total.new_zeros(seq_len - length, width)]))
    return torch.stack(rows) if rows else q
