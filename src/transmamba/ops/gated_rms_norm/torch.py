"""gated_rms_norm in plain PyTorch: SiLU, a product, and torch's own norm."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu


def gated_rms_norm_torch(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, start: int) -> Tensor:
    """Return y; see gated_rms_norm."""
    if start:
        # Not slices: the gradient of each would be a whole tensor of zeros.
        before, after = x.split((start, x.shape[-2] - start), dim=-2)
        return torch.cat([before, gated_rms_norm_torch(after, gate, weight, eps, 0)], dim=-2)
    y = x * silu(gate)
    if weight is not None:
        dtype = torch.promote_types(y.dtype, weight.dtype)  # the norm of weights in fp32 is taken in fp32
        y = rms_norm(y.to(dtype), (y.shape[-1],), weight.to(dtype), eps)
    return y.to(x.dtype)
