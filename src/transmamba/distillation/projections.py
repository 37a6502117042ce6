"""The way from a student's features to the teacher's space; used while training and dropped after it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from transmamba.errors import InputError
from transmamba.modules import DirectionOutput
from transmamba.modules.plain import is_plain
from transmamba.ops.precision import cast_once

SHARING = ("direction", "layer", "none")
ATTRIBUTE = "training_parts"  # of a student that is being distilled


class LatentProjection(nn.Module):
    """A linear map of features (..., width) to (..., target), without bias.

    padding: zeros are added on both sides first, up to the target's width (version 1 of the paper).
    """

    def __init__(self, width: int, target: int, *, padding: bool) -> None:
        super().__init__()
        missing = max(0, target - width) if padding else 0
        self.padding = (missing // 2, missing - missing // 2)
        self.linear = nn.Linear(width + missing, target, bias=False)
        with torch.no_grad():
            nn.init.eye_(self.linear.weight)
            self.linear.weight.add_(torch.randn_like(self.linear.weight) * 0.02)  # no row or column is all zeros

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(pad(features, self.padding) if any(self.padding) else features)


class LatentProjections(nn.Module):
    """A projection for every direction and layer of a student.

    sharing: "direction" = one for each direction, of all layers of one width; "layer" = one for each layer, of all its
    directions; "none" = one for each of both.
    """

    def __init__(
        self, directions: Sequence[Mapping[str, int]], target: int, *, sharing: str = "direction", padding: bool = True
    ) -> None:
        """directions: for every layer, the directions' names and widths."""
        super().__init__()
        if sharing not in SHARING:
            raise InputError(f"sharing={sharing!r} is unknown; choose one of {', '.join(SHARING)}.")
        self.sharing = sharing
        wanted = {
            self.key(layer, name, width): width
            for layer, widths in enumerate(directions)
            for name, width in widths.items()
        }
        self.by_key = nn.ModuleDict(
            {key: LatentProjection(width, target, padding=padding) for key, width in wanted.items()}
        )

    def key(self, layer: int, name: str, width: int) -> str:
        """Which projection serves a direction of a layer."""
        return {
            "direction": f"{name} {width}",
            "layer": f"layer {layer} {width}",
            "none": f"layer {layer} {name} {width}",
        }[self.sharing].replace(" ", "_")

    def forward(self, layer: int, direction: DirectionOutput) -> Tensor:
        """The features of a direction of a layer in the teacher's space, (batch, steps, hidden_size)."""
        return self.by_key[self.key(layer, direction.name, direction.features.shape[-1])](direction.features)

    def of_layer(
        self, layer: int, directions: Sequence[DirectionOutput], known: dict[tuple[str, ...], Tensor]
    ) -> Tensor:
        """The same of all these directions of a layer, (directions, batch, steps, hidden_size).

        known: the weights that earlier layers of a step have stacked, by the names of the projections. Where the
        directions are one tensor, so is their product.
        """
        every = directions[0].every
        whole = every is not None and len(every) == len(directions) and all(one.every is every for one in directions)
        if every is None or not whole:
            return torch.stack([self(layer, direction) for direction in directions])
        keys = tuple(self.key(layer, one.name, every.shape[-1]) for one in directions)
        parts = [self.by_key[key] for key in keys]
        weights = [
            part.linear.weight
            for part in parts
            if is_plain(part, LatentProjection) and is_plain(part.linear, nn.Linear) and not any(part.padding)
        ]
        if len(weights) < len(parts):  # adapters, hooks, padding
            return torch.stack([self(layer, direction) for direction in directions])
        if keys not in known:
            known[keys] = cast_once(torch.stack(weights)).transpose(1, 2)
        return torch.bmm(every.flatten(1, 2), known[keys]).unflatten(1, every.shape[1:3])


@contextmanager
def attached(student: nn.Module, parts: nn.Module) -> Iterator[None]:
    """Within, the parts are a part of the student, so that its optimizer, checkpoints and device are theirs too.

    On leaving, the student is as it was: what only the loss needed is in no saved model.
    """
    assert not hasattr(student, ATTRIBUTE), "a student is distilled by one objective at a time"
    setattr(student, ATTRIBUTE, parts)
    try:
        yield
    finally:
        delattr(student, ATTRIBUTE)
