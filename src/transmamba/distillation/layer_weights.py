"""How much each layer of the student counts in the loss, given how near it is to the teacher."""

import torch
from torch import Tensor

from transmamba.errors import InputError

LEAST_COSINE = 0.05  # a cosine near or below zero, usual at the start, would make the ratio explode or turn negative
LAYER_WEIGHTS = {
    "ratio": "the mean cosine over the layer's own: low similarity counts more (version 1 of the paper)",
    "uniform": "1",
    "linear": "proportional to the depth (the paper's public code)",
    "softmax": "proportional to exp(-cosine / temperature)",
}


def layer_weights(cosines: Tensor, form: str = "ratio", *, temperature: float = 0.1) -> Tensor:
    """Weights of the layers whose cosines are (layers,) or (layers, directions), with a mean over layers of 1, of every
    direction by itself, and without gradient.

    The ratio is detached: with a gradient through it, layers that are near would be pushed away wherever another is
    far. form: a name of LAYER_WEIGHTS.

    Raises:
        InputError: the form is unknown, or the temperature is not above 0.
    """
    c = cosines.detach()
    if form == "ratio":
        clamped = c.clamp(LEAST_COSINE, 1)
        weights = clamped.mean(0) / clamped
    elif form == "uniform":
        weights = torch.ones_like(c)
    elif form == "linear":
        depth = torch.arange(1, len(c) + 1, dtype=c.dtype, device=c.device)
        weights = depth.reshape(-1, *(1,) * (c.dim() - 1)).expand_as(c)
    elif form == "softmax":
        if not temperature > 0:
            raise InputError(f"temperature={temperature} must be above 0; 0.1 tells cosines apart.")
        weights = torch.softmax(-c / temperature, dim=0)
    else:
        raise InputError(f"layer_weights={form!r} is unknown; choose one of {', '.join(LAYER_WEIGHTS)}.")
    return weights * len(c) / weights.sum(0)
