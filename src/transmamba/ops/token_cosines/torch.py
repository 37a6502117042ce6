"""token_cosines in plain PyTorch: the tokens are standardised once, then put in the order of every direction."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm, normalize

from .reference import EPS, LEAST_LENGTH


def token_cosines_torch(x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    """Return the cosines; see token_cosines."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    tokens = standardised(y.to(dtype))
    if not x.numel():
        return x.to(dtype).sum(-1)
    return torch.stack(
        [Cosine.apply(ours, tokens.index_select(1, steps)) for ours, steps in zip(x, places, strict=True)]
    )


def standardised(features: Tensor) -> Tensor:
    """Features (..., width), fp32 or fp64, without mean and of length 1."""
    return normalize(layer_norm(features, features.shape[-1:]), dim=-1, eps=LEAST_LENGTH)


class Cosine(torch.autograd.Function):
    """The cosines (...) of x, standardised, and of y, which is so already, each (..., width).

    With a the layer norm of x, c = a y / |a|, whose gradient y / |a| - c a / |a|^2 has no mean and is orthogonal to a:
    so layer norm's own gradient does nothing but scale it. Step by step, autograd would keep and walk through five
    tensors of the features' size in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        a, _, scale = torch.native_layer_norm(x.to(y.dtype), x.shape[-1:], None, None, EPS)
        length = torch.linalg.vector_norm(a, dim=-1, keepdim=True).clamp(min=LEAST_LENGTH)
        cosine = (a * y).sum(-1, keepdim=True) / length
        ctx.save_for_backward(a, y, cosine, scale, length)
        ctx.dtype = x.dtype
        return cosine.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        a, y, cosine, scale, length = ctx.saved_tensors
        slope = gradients[0].unsqueeze(-1) / length
        dx = (y * (slope * scale)).addcmul_(a, -slope * scale * cosine / length).to(ctx.dtype)
        return dx, slope * a if ctx.needs_input_grad[1] else None
