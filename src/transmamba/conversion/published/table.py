"""What a family of published checkpoints is: how it is recognised, its sizes, its table of names."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from transmamba.conversion.plan import Move
from transmamba.errors import CheckpointError
from transmamba.models import VisionMambaClassifier

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedFamily:
    """How the checkpoints of one published code are read.

    signs: tensors that every checkpoint of the family has, and absent: tensors that none has; regular expressions of
    whole names. configuration: from path, shapes and fields that the user gives. moves: the table, names to names.
    prepare: what must be done to the weights first.
    """

    name: str
    signs: tuple[str, ...]
    absent: tuple[str, ...]
    configuration: Callable[[str, Shapes, dict[str, Any]], PreTrainedConfig]
    model: Callable[[Any], VisionMambaClassifier]
    moves: Callable[[Any, Shapes], list[Move]]
    prepare: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] | None = None

    def recognises(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names are one of the family's checkpoints."""
        listed = list(names)

        def has(pattern: str) -> bool:
            return any(re.fullmatch(pattern, name) for name in listed)

        return all(map(has, self.signs)) and not any(map(has, self.absent))


def rename(
    path: str, moves: list[Move], weights: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights under our names: every tensor is used exactly once, and every shape fits.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, has one too many, or one of another shape.
    """
    by_target = {move.target: move.source for move in moves}
    assert set(by_target) == set(targets), f"the table and the model differ: {set(by_target) ^ set(targets)}"
    assert len({move.source for move in moves}) == len(moves), "a tensor is used twice"
    missing = sorted(set(by_target.values()) - set(weights))
    if missing:
        raise CheckpointError(
            f"{path} lacks {missing[0]}{_and_more(missing)}; it is incomplete, or of another size than its other "
            "tensors tell."
        )
    unknown = sorted(set(weights) - set(by_target.values()))
    if unknown:
        raise CheckpointError(
            f"{path} has {unknown[0]}{_and_more(unknown)}, which has no place in the model; it is of a variant that is "
            "not supported."
        )
    for target, source in by_target.items():
        found, wanted = tuple(weights[source].shape), tuple(targets[target].shape)
        if found not in (wanted, (*wanted, 1, 1)):  # a projection may be stored as a convolution of 1 x 1
            raise CheckpointError(
                f"{path}: {source} has shape {found}, and the sizes that the other tensors tell ask for {wanted}; give "
                "the fields that differ, such as image_size."
            )
    return {target: weights[source].reshape(targets[target].shape) for target, source in by_target.items()}


def count(shapes: Shapes, pattern: str) -> int:
    """How many numbers stand for the group in names that match: one more than the largest."""
    found = [int(match[1]) for name in shapes if (match := re.fullmatch(pattern, name))]
    return max(found, default=-1) + 1


def shape_of(path: str, shapes: Shapes, name: str) -> tuple[int, ...]:
    """The shape of a tensor that tells a size.

    Raises:
        CheckpointError: it is not there.
    """
    if name not in shapes:
        raise CheckpointError(f"{path} lacks {name}, which tells a size of the model; it is incomplete.")
    return shapes[name]


def side_of(path: str, patches: int) -> int:
    """The side of a square grid of patches.

    Raises:
        CheckpointError: it is none.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(f"{path} has positions for {patches} patches, which are no square; give image_size.")
    return side


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
