"""conv_ssd_step in plain PyTorch, and the ring of inputs that attention's projections pass through as well."""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from transmamba.ops.causal_conv1d.torch import depthwise_valid
from transmamba.ops.heads import accumulation_dtype
from transmamba.ops.ssd_step.torch import ssd_step_torch


def conv_ssd_step_torch(
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
    if ring is not None and weight is not None:
        q, k, v = ring_convolution(ring, positions, (q, k, v), weight, bias)
    q_h, k_h, v_h = q.unflatten(1, (-1, n)), k.unflatten(1, (-1, n)), v.unflatten(1, (-1, p))
    steps = softplus(dt.to(dtype) + dt_bias.to(dtype))
    y, new_state = ssd_step_torch(state, q_h, k_h, v_h, steps, -A_log.to(dtype).exp(), D)
    state.copy_(new_state)
    return y.flatten(1) if z is None else y.flatten(1) * silu(z)


def ring_convolution(
    ring: Tensor, positions: Tensor, inputs: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Write one token's inputs, (rows, channels) in parts, to their places in the ring, (rows, slots, channels), and
    return them convolved with those before and through SiLU, in the same parts.
    """
    slots, kernel = ring.shape[1], weight.shape[1]
    rows = torch.arange(len(ring), device=ring.device)
    ring[rows, positions % slots] = torch.cat(inputs, dim=1)
    taps = positions[:, None] + torch.arange(1 - kernel, 1, device=ring.device)
    y = silu(depthwise_valid(ring[rows[:, None], taps % slots], weight, bias)[:, 0])
    return y.split([x.shape[1] for x in inputs], dim=1)
