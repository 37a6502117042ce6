"""The specification of token_cosines."""

import torch
from torch import Tensor

EPS = 1e-5  # of layer norm
LEAST_LENGTH = 1e-8  # of features, so that those without any have a cosine of 0


def token_cosines_reference(x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    """Return the cosines; see token_cosines."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    chosen = torch.stack([y[:, steps] for steps in places]) if len(places) else x
    a, b = (_standardised(given.to(dtype)) for given in (x, chosen))
    return (a * b).sum(-1)


def _standardised(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    a = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + EPS)
    return a / torch.sqrt(a.square().sum(-1, keepdim=True)).clamp(min=LEAST_LENGTH)
