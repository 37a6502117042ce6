"""Learning rates by depth: the layers of a pretrained model move less, the nearer they are to its input."""

import re
from collections.abc import Sequence

from transmamba.errors import RecipeError

__all__ = ["layer_rates"]

LAYER = re.compile(r"^(.*\b(?:layers|layer|blocks)\.\d+)\.")  # up to the last of them: blocks within stages count


def layer_rates(names: Sequence[str], decay: float) -> dict[str, float]:
    """For every parameter of these names, in a model's own order, the share of the learning rate that it gets.

    Heads, final norms and whatever else follows the layers have 1, the last layer decay, the first decay^layers, and
    embeddings decay^(layers + 1).
    Source: Bao et al. 2021 (arXiv 2106.08254), appendix; 0.65 to 0.75 is usual in fine-tuning ViTs.

    Raises:
        RecipeError: decay is not above 0 and at most 1.
    """
    if not 0 < decay <= 1:
        raise RecipeError(f"layer_decay={decay} must be above 0 and at most 1; 0.75 is usual, 1 is no decay.")
    found = [match.group(1) if (match := LAYER.match(name)) else None for name in names]
    layers = list(dict.fromkeys(layer for layer in found if layer is not None))
    depths = {layer: number + 1 for number, layer in enumerate(layers)}
    above = len(layers) + 1
    rates, seen_layer = {}, not layers
    for name, layer in zip(names, found, strict=True):
        seen_layer = seen_layer or layer is not None
        depth = depths[layer] if layer is not None else above if seen_layer else 0
        rates[name] = decay ** (above - depth)
    return rates
