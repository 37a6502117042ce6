"""The specification of step_linear: the formula, in whatever float dtype it is given."""

from collections.abc import Sequence

import torch
from torch import Tensor


def step_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> tuple[Tensor, ...]:
    """Return the products; see step_linear."""
    given = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if norm_weight is not None:
        given = given * (given.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * norm_weight.to(given.dtype)
    products = [given @ weight.to(given.dtype).T for weight in weights]
    if gated:
        gate, up = products
        products = [gate * torch.sigmoid(gate) * up]
    if residual is not None:
        products = [products[0] + residual.to(given.dtype)]
    return tuple(y.to(x.dtype) for y in products)
