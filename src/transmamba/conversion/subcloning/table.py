"""The table of a subcloning: for every parameter of the student, or part of one, where it comes from.

Unlike in a lossless conversion, a tensor of the teacher may be used in part, by several parameters, or not at all.
Every element of the student has exactly one row, which names its indices by index set, so that the table stays short:

    backbone.layers.0.mixer.in_proj.weight[0:384]  <-  layers.0.mlp.fc1.weight[layer 0 x, residual] x 1.414
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from transmamba.conversion.plan import IgnoredTensor, Part
from transmamba.modules.patches import resize_positions

IndexSets = Mapping[str, tuple[int, ...]]
FreshValue = Literal["drawn", "identity_tap", "zero"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionChange:
    """How position embeddings (1, other tokens and patches, width) become those of another sequence.

    tokens: of the teacher before its patches, the class token first. class_at: where the student has the class token
    among its patches; None = it has none.
    """

    tokens: int
    source_grid: tuple[int, int]
    target_grid: tuple[int, int]
    class_at: int | None

    def __str__(self) -> str:
        grid = "" if self.source_grid == self.target_grid else f"resized from {_by(self.source_grid)} to "
        place = "no class token" if self.class_at is None else f"class token at {self.class_at}"
        return f"{grid}{_by(self.target_grid)} patches, {place}"

    def apply(self, positions: Tensor) -> Tensor:
        """The positions of the student's sequence."""
        patches = resize_positions(positions[:, self.tokens :], self.source_grid, self.target_grid)
        if self.class_at is None:
            return patches
        return torch.cat([patches[:, : self.class_at], positions[:, :1], patches[:, self.class_at :]], dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubclonedPart:
    """A parameter, or part of one, that comes from the teacher.

    shape: of the part. into: where it goes in the parameter; None = it is the whole. part, transform: what is taken of
    the source first. indices: for each dimension of that, the name of an index set, or None = all. scale: multiplies
    the values; sqrt(inputs of the source / inputs that are taken) where rescaling is on.
    """

    target: str
    shape: tuple[int, ...]
    into: Part | None
    source: str
    indices: tuple[str | None, ...]
    part: Part | None = None
    transform: Literal["copy", "transpose", "middle_frame", "mean"] = "copy"
    positions: PositionChange | None = None
    scale: float = 1.0

    @property
    def kind(self) -> str:
        """copied, or subcloned where it is a selection."""
        is_whole = self.part is None and not any(self.indices) and self.positions is None and self.transform != "mean"
        return "copied" if is_whole else "subcloned"

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        chosen = ", ".join(name or ":" for name in self.indices)
        words = f"{self.source}{self.part or ''}" + (f"[{chosen}]" if any(self.indices) else "")
        words += "" if self.transform == "copy" else f", {self.transform.replace('_', ' ')}"
        words += "" if self.positions is None else f", {self.positions}"
        return words + ("" if self.scale == 1 else f", x {self.scale:.4g}")

    def take(self, tensor: Tensor, index_sets: IndexSets) -> Tensor:
        """The values out of the source's tensor."""
        if self.part is not None:
            tensor = tensor.narrow(self.part.dim, self.part.start, self.part.stop - self.part.start)
        if self.transform == "transpose":
            tensor = tensor.T
        if self.transform == "mean":
            tensor = tensor.mean(dim=0, keepdim=True)
        if self.positions is not None:
            tensor = self.positions.apply(tensor)
        for dim, name in enumerate(self.indices):
            if name is not None:
                tensor = tensor.index_select(dim, torch.tensor(index_sets[name], device=tensor.device))
        if self.transform == "middle_frame":
            frames = self.shape[2]
            stacked = tensor.new_zeros((*tensor.shape[:2], frames, *tensor.shape[2:]))
            stacked[:, :, frames // 2] = tensor
            tensor = stacked
        return tensor if self.scale == 1 else tensor * self.scale


@dataclass(frozen=True, kw_only=True, slots=True)
class FreshPart:
    """A parameter, or part of one, that does not come from the teacher. value: "drawn" as in a new model, or set."""

    target: str
    shape: tuple[int, ...]
    into: Part | None
    initial_value: str
    value: FreshValue = "drawn"

    @property
    def kind(self) -> str:
        return "fresh"

    @property
    def origin(self) -> str:
        """Its initial value, in words."""
        return self.initial_value


@dataclass(frozen=True, kw_only=True, slots=True)
class SubcloningPlan:
    """The table of one subcloning. Iterating gives the rows, in the order of the student's parameters.

    depth_map: for every block of the student, the block of the teacher that it comes from, or None.
    index_sets: by name, the indices that are taken, in the order in which they are taken.
    """

    teacher: str
    family: str
    student: str
    ranking: str
    rescale: bool
    depth_map: tuple[int | None, ...]
    index_sets: dict[str, tuple[int, ...]]
    rows: tuple[SubclonedPart | FreshPart, ...]
    ignored: tuple[IgnoredTensor, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[SubclonedPart | FreshPart]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def subcloned(self) -> tuple[SubclonedPart, ...]:
        """The rows that come from the teacher."""
        return tuple(row for row in self.rows if isinstance(row, SubclonedPart))

    @property
    def fresh(self) -> tuple[FreshPart, ...]:
        """The rows that do not."""
        return tuple(row for row in self.rows if isinstance(row, FreshPart))

    @property
    def share_from_teacher(self) -> float:
        """The share of the student's parameters that comes from the teacher."""
        total = sum(prod(row.shape) for row in self.rows)
        return sum(prod(row.shape) for row in self.subcloned) / total

    @torch.no_grad()
    def apply(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Write every row into the student's parameters, which keep what they have where a row is drawn."""
        for row in self.rows:
            target = parameters[row.target]
            if row.into is not None:
                target = target.narrow(row.into.dim, row.into.start, row.into.stop - row.into.start)
            if isinstance(row, SubclonedPart):
                target.copy_(row.take(tensors[row.source], self.index_sets))
            elif row.value == "zero":
                target.zero_()
            elif row.value == "identity_tap":
                target.zero_()
                identity_tap(target).fill_(1.0)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it: subcloning.json."""
        return {
            "teacher": self.teacher,
            "family": self.family,
            "student": self.student,
            "ranking": self.ranking,
            "rescale": self.rescale,
            "depth_map": list(self.depth_map),
            "share_from_teacher": self.share_from_teacher,
            "notes": list(self.notes),
            "index_sets": {name: list(indices) for name, indices in self.index_sets.items()},
            "parameters": [{"kind": row.kind, **asdict(row)} for row in self.rows],
            "ignored": [asdict(tensor) for tensor in self.ignored],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def __str__(self) -> str:
        """The table as text, a row a line: what a dry run prints."""
        rows = [(f"{row.target}{row.into or ''}", row.kind, row.origin, _by(row.shape)) for row in self.rows]
        rows += [("", "ignored", f"{one.source}: {one.reason}", _by(one.shape)) for one in self.ignored]
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]]
        lines = [f"{self.teacher} ({self.family}) -> {self.student}, ranking {self.ranking}"]
        for cells in rows:
            lines.append("  ".join((*map(str.ljust, cells[:3], widths), cells[3])))
        return "\n".join([*lines, *self.notes])


def identity_tap(kernel: Tensor) -> Tensor:
    """The tap of a depthwise kernel that reads the token itself: the last of a causal one, the middle of a 2-D one."""
    return kernel[..., -1] if kernel.dim() == 3 else kernel[..., kernel.shape[-2] // 2, kernel.shape[-1] // 2]


def check_cover(rows: Sequence[SubclonedPart | FreshPart], target_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every element of every parameter has exactly one row, and every row the shape of its place."""
    by_target: dict[str, list[SubclonedPart | FreshPart]] = {name: [] for name in target_shapes}
    for row in rows:
        by_target[row.target].append(row)
    for target, parts in by_target.items():
        shape = target_shapes[target]
        if len(parts) == 1 and parts[0].into is None:
            assert parts[0].shape == shape, f"{target}: a row of shape {parts[0].shape} for {shape}"
            continue
        places = sorted((part.into for part in parts if part.into is not None), key=lambda place: place.start)
        assert len(places) == len(parts) >= 1, f"{target} has {len(parts)} rows of which one is the whole, or none"
        dim = places[0].dim
        assert all(place.dim == dim for place in places), f"{target} is cut along two dimensions"
        borders = [0, *(place.stop for place in places)]
        assert [place.start for place in places] == borders[:-1], f"{target} has a gap or an overlap"
        assert borders[-1] == shape[dim], f"{target} is not filled"
        for part in parts:
            assert part.into is not None
            wanted = list(shape)
            wanted[dim] = part.into.stop - part.into.start
            assert part.shape == tuple(wanted), f"{target}: a row of shape {part.shape} for {tuple(wanted)}"


def _by(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))
