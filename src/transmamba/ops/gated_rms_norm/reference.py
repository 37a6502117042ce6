"""The specification of gated_rms_norm."""

import torch
from torch import Tensor


def gated_rms_norm_reference(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, start: int) -> Tensor:
    """Return y; see gated_rms_norm."""
    before, after = (x[..., :start, :], x[..., start:, :]) if start else (None, x)
    gate = gate.to(x.dtype)
    y = after * gate / (1 + torch.exp(-gate))
    if weight is not None:
        y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    return y if before is None else torch.cat([before, y], dim=-2)
