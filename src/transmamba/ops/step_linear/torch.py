"""step_linear in plain PyTorch: its norm, its products, each a call."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu


def step_linear_torch(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gated: bool,
) -> tuple[Tensor, ...]:
    """Return the products; see step_linear."""
    if norm_weight is not None:
        x = rms_norm(x, x.shape[-1:], norm_weight, eps)
    products = [linear(x, weight) for weight in weights]
    if gated:
        products = [silu(products[0]) * products[1]]
    if residual is not None:
        products = [residual + products[0]]
    return tuple(products)
