"""How a table grows: rows that take indices of named dimensions, and fresh rows for all that is left."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from transmamba.conversion.plan import IgnoredTensor, Part
from transmamba.errors import InputError

from .rankings import Scores, choose
from .table import FreshPart, FreshValue, PositionChange, SubclonedPart, check_cover
from .teachers import RESIDUAL, SubcloningTeacher

Shape = tuple[int, ...]
NORM_BEFORE_MIXER = r"(blocks\.\d+\.norm1|layers\.\d+\.(norm|input_layernorm|mixer_norm))\.weight$"


class TableBuilder:
    """Rows for the parameters of a student, by their shapes.

    Index sets are chosen once and go by name; one that is all indices in order is None, so that rows say what is whole.
    """

    def __init__(
        self, teacher: SubcloningTeacher, scores: Scores, target_shapes: Mapping[str, Shape], *, rescale: bool
    ) -> None:
        self.teacher = teacher
        self.scores = scores
        self.shapes = target_shapes
        self.rescale = rescale
        self.sizes = teacher.sizes
        self.index_sets: dict[str, tuple[int, ...]] = {}
        self.rows: list[SubclonedPart | FreshPart] = []

    def index_set(self, name: str, axis: str, wanted: int, available: Sequence[int] | None = None) -> str | None:
        """The name of a set of `wanted` of the available indices of a dimension of the teacher; None where it is all.

        Raises:
            InputError: the student is wider than the teacher.
        """
        size = self.sizes[axis]
        if wanted > size:
            raise InputError(
                f"the student is wider than its teacher: {wanted} of {name} are wanted and the teacher's {axis} has "
                f"{size}; choose a student of at most the teacher's width, or a wider teacher."
            )
        return self.given_set(name, axis, choose(self.scores.get(axis), size, wanted, available))

    def given_set(self, name: str, axis: str, indices: Sequence[int]) -> str | None:
        """The same for indices that are known."""
        if list(indices) == list(range(self.sizes[axis])):
            return None
        self.index_sets[name] = tuple(indices)
        return name

    def residual(self, width: int) -> str | None:
        """The one set of the residual stream for a student, or stage, of this width."""
        name = RESIDUAL if len(set(self._widths())) == 1 else f"{RESIDUAL} {width}"
        return name if name in self.index_sets else self.index_set(name, RESIDUAL, width)

    def take(
        self,
        target: str,
        own_name: str,
        indices: tuple[str | None, ...],
        *,
        into: Part | None = None,
        transform: Literal["copy", "middle_frame", "mean"] = "copy",
        positions: PositionChange | None = None,
        is_linear: bool = False,
    ) -> None:
        """Add the row of a parameter that the student has; nothing where it has none."""
        if target not in self.shapes or own_name not in self.teacher.tensors:
            return
        tensor = self.teacher.tensors[own_name]
        shape = list(self.shapes[target])
        if into is not None:
            shape[into.dim] = into.stop - into.start
        scale = 1.0
        if self.rescale and is_linear and indices[1] is not None:
            scale = math.sqrt(tensor.value.shape[1] / len(self.index_sets[indices[1]]))
        self.rows.append(
            SubclonedPart(
                target=target,
                shape=tuple(shape),
                into=into,
                source=tensor.source,
                indices=indices,
                part=tensor.part,
                transform="transpose" if tensor.transposed else transform,
                positions=positions,
                scale=scale,
            )
        )

    def set_value(self, target: str, value: FreshValue, words: str) -> None:
        """Add the row of a parameter that begins with a value of ours, if the student has it."""
        if target in self.shapes:
            self.rows.append(
                FreshPart(target=target, shape=self.shapes[target], into=None, initial_value=words, value=value)
            )

    def finish(
        self, initial_value: Callable[[str], str]
    ) -> tuple[tuple[SubclonedPart | FreshPart, ...], tuple[IgnoredTensor, ...]]:
        """All rows in the order of the student, with fresh ones for what none fills; and what nothing was taken of."""
        by_target: dict[str, list[SubclonedPart | FreshPart]] = {name: [] for name in self.shapes}
        for row in self.rows:
            by_target[row.target].append(row)
        rows: list[SubclonedPart | FreshPart] = []
        for target, parts in by_target.items():
            words = initial_value(target)
            if not parts:
                parts = [FreshPart(target=target, shape=self.shapes[target], into=None, initial_value=words)]
            elif parts[0].into is not None:
                parts = sorted(parts, key=lambda part: part.into.start if part.into else 0)
                parts += self._rest(target, parts, words)
            rows += parts
        check_cover(rows, self.shapes)
        used = {row.source for row in rows if isinstance(row, SubclonedPart)}
        ignored = [
            IgnoredTensor(source=name, shape=tuple(tensor.shape), reason=self._reason(name))
            for name, tensor in self.teacher.sources.items()
            if name not in used
        ]
        return tuple(rows), tuple(ignored)

    def _rest(self, target: str, parts: Sequence[SubclonedPart | FreshPart], words: str) -> list[FreshPart]:
        last = parts[-1].into
        assert last is not None
        shape = list(self.shapes[target])
        whole = shape[last.dim]
        if last.stop == whole:
            return []
        shape[last.dim] = whole - last.stop
        rest = Part(dim=last.dim, start=last.stop, stop=whole)
        return [FreshPart(target=target, shape=tuple(shape), into=rest, initial_value=words)]

    def _reason(self, source: str) -> str:
        return self.teacher.unread.get(source, "the student takes nothing from it")

    def _widths(self) -> list[int]:
        """The widths of the student's norms before mixers: one, or those of a pyramid's stages."""
        return [shape[0] for name, shape in self.shapes.items() if re.search(NORM_BEFORE_MIXER, name)]
