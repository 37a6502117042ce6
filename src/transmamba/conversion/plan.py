"""A conversion is a table: where every parameter of the student comes from, where every tensor of the source goes."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from transmamba.errors import CheckpointError

Transform = Literal["copy", "transpose"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Indices start to stop - 1 of one dimension of a tensor."""

    dim: int
    start: int
    stop: int

    def __str__(self) -> str:
        return "[" + ":, " * self.dim + f"{self.start}:{self.stop}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class CopiedParameter:
    """A parameter that is a tensor of the source, or a part of one, perhaps transposed."""

    target: str
    shape: tuple[int, ...]
    source: str
    part: Part | None
    transform: Transform

    @property
    def kind(self) -> str:
        """copied, or sliced where it is a part."""
        return "copied" if self.part is None else "sliced"

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        return f"{self.source}{self.part or ''}" + ("" if self.transform == "copy" else f", {self.transform}d")

    def take(self, tensor: Tensor) -> Tensor:
        """The parameter's values out of the source's tensor; may share its memory."""
        if self.part is not None:
            tensor = tensor.narrow(self.part.dim, self.part.start, self.part.stop - self.part.start)
        return tensor.T if self.transform == "transpose" else tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class FreshParameter:
    """A parameter that the source does not have."""

    target: str
    shape: tuple[int, ...]
    initial_value: str

    @property
    def kind(self) -> str:
        return "fresh"

    @property
    def origin(self) -> str:
        """Its initial value, in words."""
        return self.initial_value


@dataclass(frozen=True, kw_only=True, slots=True)
class IgnoredTensor:
    """A tensor of the source that no parameter needs."""

    source: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """A line of a family's table, before shapes are known: this tensor, or this part of it, becomes this parameter."""

    source: str
    target: str
    transform: Transform = "copy"
    part: Part | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionPlan:
    """The table of one conversion, and the report of what was done. Iterating gives a row per parameter.

    notes: what a user should know of this source. trans_points: the student's schedule.
    """

    source: str
    family: str
    initialisation: str
    trans_points: tuple[int | None, ...]
    rows: tuple[CopiedParameter | FreshParameter, ...]
    ignored: tuple[IgnoredTensor, ...]
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[CopiedParameter | FreshParameter]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def copied(self) -> tuple[CopiedParameter, ...]:
        """The rows that come from the source."""
        return tuple(row for row in self.rows if isinstance(row, CopiedParameter))

    @property
    def fresh(self) -> tuple[FreshParameter, ...]:
        """The rows that do not."""
        return tuple(row for row in self.rows if isinstance(row, FreshParameter))

    def with_initial_values(self, values: Mapping[str, str]) -> "ConversionPlan":
        """The plan with other words for the initial values of some fresh parameters."""
        rows = tuple(
            replace(row, initial_value=values[row.target])
            if isinstance(row, FreshParameter) and row.target in values
            else row
            for row in self.rows
        )
        return replace(self, rows=rows)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it: conversion.json."""
        return {
            "source": self.source,
            "family": self.family,
            "initialisation": self.initialisation,
            "trans_points": list(self.trans_points),
            "notes": list(self.notes),
            "parameters": [{"kind": row.kind, **asdict(row)} for row in self.rows],
            "ignored": [asdict(tensor) for tensor in self.ignored],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"


def check_moves(
    name: str,
    moves: Sequence[Move],
    ignored: Sequence[IgnoredTensor],
    source_shapes: Mapping[str, tuple[int, ...]],
    target_shapes: Mapping[str, tuple[int, ...]],
) -> list[CopiedParameter]:
    """Return the rows of these moves: every tensor is used exactly once and whole, or ignored, and every shape fits.

    Raises:
        CheckpointError: the source lacks a tensor, has one too many, or one has another shape.
    """
    by_source: dict[str, list[Move]] = {}
    for move in moves:
        by_source.setdefault(move.source, []).append(move)
    passed_over = {tensor.source for tensor in ignored}
    missing = sorted(set(by_source) - set(source_shapes))
    if missing:
        raise CheckpointError(
            f"{name} lacks {missing[0]}{_and_more(missing)}, which its config.json asks for; copy the checkpoint anew, "
            "with all its shards."
        )
    unknown = sorted(set(source_shapes) - set(by_source) - passed_over)
    if unknown:
        raise CheckpointError(
            f"{name} has {unknown[0]}{_and_more(unknown)}, which has no place in the student; a model with parts of "
            "its own cannot be converted without loss. Convert the plain causal language model."
        )
    targets = [move.target for move in moves]
    assert len(set(targets)) == len(targets), "a parameter has two sources"
    assert not passed_over & set(by_source), "a tensor is both used and ignored"
    for source, users in by_source.items():
        _check_whole(name, source, source_shapes[source], [move.part for move in users])
    rows = [_row(name, move, source_shapes[move.source], target_shapes) for move in moves]
    order = {target: place for place, target in enumerate(target_shapes)}
    return sorted(rows, key=lambda row: order[row.target])


def _check_whole(name: str, source: str, shape: tuple[int, ...], parts: list[Part | None]) -> None:
    if parts == [None]:
        return
    assert None not in parts, f"{source} is used as a whole and in parts"
    cut = sorted((part for part in parts if part is not None), key=lambda part: part.start)
    size = shape[cut[0].dim] if cut[0].dim < len(shape) else 0
    if cut[-1].stop != size:
        raise CheckpointError(
            f"{name}: {source} has shape {shape}; its dimension {cut[0].dim} should be {cut[-1].stop} by config.json."
        )
    joints = [(part.start, part.stop) for part in cut]
    assert joints[0][0] == 0, f"the parts of {source} leave out its beginning"
    assert all(stop == start for (_, stop), (start, _) in pairwise(joints)), f"{source} has gaps"


def _row(
    name: str, move: Move, shape: tuple[int, ...], target_shapes: Mapping[str, tuple[int, ...]]
) -> CopiedParameter:
    wanted = target_shapes[move.target]
    found = list(shape)
    if move.part is not None:
        found[move.part.dim] = move.part.stop - move.part.start
    if move.transform == "transpose":
        found.reverse()
    if tuple(found) != wanted:
        raise CheckpointError(
            f"{name}: {move.source} has shape {shape}, which gives {tuple(found)} for {move.target}; config.json asks "
            f"for {wanted}. The weights and config.json do not belong together."
        )
    return CopiedParameter(
        target=move.target, shape=wanted, source=move.source, part=move.part, transform=move.transform
    )


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
