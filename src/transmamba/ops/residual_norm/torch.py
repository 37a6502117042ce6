"""residual_norm and post_norm in plain PyTorch: torch's own norms, in the wider dtype of x and weight."""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm


def residual_norm_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (the norm, x); see residual_norm."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    given, weight = x.to(wide), weight.to(wide)
    if centred:
        return layer_norm(given, weight.shape, weight, None if bias is None else bias.to(wide), eps).to(dtype), x
    y = rms_norm(given, weight.shape, weight, eps)
    return (y if bias is None else y + bias.to(wide)).to(dtype), x


def post_norm_torch(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: torch.dtype
) -> Tensor:
    """Return the norm of the sum; see post_norm."""
    return residual_norm_torch(x + branch, weight, bias, eps, centred, dtype)[0]
