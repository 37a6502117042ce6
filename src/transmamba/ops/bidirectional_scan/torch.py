"""bidirectional_scan in plain PyTorch: both directions as the two halves of the heads of one scan."""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from transmamba.ops.causal_conv1d.torch import causal_conv1d_torch
from transmamba.ops.ssd_scan.torch import ssd_scan_torch
from transmamba.ops.turning import turn, turned_rows


def bidirectional_scan_torch(
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
    heads = D[0].shape[0]
    turned = None if lengths is None else turned_rows(lengths, q.shape[1])
    dtype = torch.promote_types(dt.dtype, torch.float32)  # sums of dt A drift in 16 bits
    inputs = torch.cat([q, k, v], dim=-1)
    means = None if m is None else m.to(q.dtype)
    ways = []
    for way, raw in enumerate(dt.to(dtype).chunk(2, dim=-1)):
        x, mean, steps = inputs, means, raw + dt_bias[way].to(dtype)
        if way:
            x, steps = turn(x, turned), turn(steps, turned)
            mean = None if mean is None else turn(mean, turned)
        if weight is not None:
            x, _ = causal_conv1d_torch(x, weight, bias, activation=activation)
        elif activation == "silu":
            x = silu(x)
        queries, keys, values = (part.unflatten(-1, (heads, -1)) for part in x.chunk(3, dim=-1))
        queries = queries * queries.shape[-1] ** -0.5
        if mean is not None:
            queries = torch.cat([queries, torch.ones_like(mean)[..., None]], dim=-1)
            keys = torch.cat([keys, mean[..., None]], dim=-1)
        ways.append((queries, keys, values, softplus(steps)))
    q2, k2, v2, steps = (torch.cat(pair, dim=2) for pair in zip(*ways, strict=True))
    y, _ = ssd_scan_torch(q2, k2, v2, steps, -torch.exp(torch.cat(A_log).to(dtype)), torch.cat(D))
    forward, backward = (half.flatten(2) for half in y.chunk(2, dim=2))
    total = forward + turn(backward, turned)
    if gate is not None:
        total = total * silu(gate)
    if lengths is None:
        return total
    inside = torch.arange(q.shape[1], device=q.device) < lengths[:, None]
    return torch.where(inside[..., None], total, torch.zeros((), dtype=total.dtype, device=total.device))
