"""The specification of residual_norm and post_norm."""

import torch
from torch import Tensor


def residual_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (the norm, x); see residual_norm."""
    wide = x.to(torch.promote_types(x.dtype, weight.dtype))
    a = wide - wide.mean(-1, keepdim=True) if centred else wide
    y = a / torch.sqrt(a.square().mean(-1, keepdim=True) + eps) * weight
    return (y if bias is None else y + bias).to(dtype), x


def post_norm_reference(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: torch.dtype
) -> Tensor:
    """Return the norm of the sum; see post_norm."""
    wide = torch.promote_types(torch.promote_types(x.dtype, branch.dtype), weight.dtype)
    return residual_norm_reference(x.to(wide) + branch.to(wide), weight, bias, eps, centred, dtype)[0]
