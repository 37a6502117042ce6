"""The specification of conv_ssd_step: ring, convolution, step and gate, one after the other."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from transmamba.ops.heads import accumulation_dtype
from transmamba.ops.ssd_step.reference import ssd_step_reference


def conv_ssd_step_reference(
    state: Tensor,
    ring: Tensor | None,
    positions: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
) -> Tensor:
    """Return y and leave state and ring advanced; see conv_ssd_step."""
    dtype, (n, p) = accumulation_dtype(q), state.shape[2:]
    sizes = (q.shape[1], k.shape[1], v.shape[1])
    channels = torch.cat([q, k, v], dim=1)
    if ring is not None and weight is not None:
        slots, kernel = ring.shape[1], weight.shape[1]
        rows = []
        for row, position in enumerate(positions.tolist()):
            ring[row, position % slots] = channels[row]
            window = torch.stack([ring[row, (position - kernel + 1 + tap) % slots] for tap in range(kernel)])
            rows.append((window.to(dtype) * weight.to(dtype).T).sum(dim=0))
        channels = torch.stack(rows) if rows else channels
        channels = channels if bias is None else channels + bias.to(dtype)
        channels = channels * torch.sigmoid(channels)
    q_h, k_h, v_h = (
        x.to(dtype).unflatten(1, (-1, s)) for x, s in zip(channels.split(sizes, 1), (n, n, p), strict=True)
    )
    steps = softplus(dt.to(dtype) + dt_bias.to(dtype))
    y, new_state = ssd_step_reference(state, q_h, k_h, v_h, steps, -torch.exp(A_log.to(dtype)), D)
    state.copy_(new_state)
    y = y.flatten(1)
    if z is not None:
        y = y * z.to(dtype) * torch.sigmoid(z.to(dtype))
    return y.to(q.dtype)
