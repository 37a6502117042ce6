"""The report of the quickstart of images: one teacher, students of one size, and what each of them got out of the same
images. Every sentence is made from the numbers and holds for any numbers.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transmamba.errors import InputError
from transmamba.report import figures
from transmamba.report.adaption import alignment_figure, confusion_figure
from transmamba.report.html import Page, write_text
from transmamba.report.student import print_points, print_rows, without_nan
from transmamba.report.units import format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ClassifierRow", "VisionQuickstartReport"]

HEADERS = ("model", "top-1", "top-5", "loss", "parameters", "from the teacher", "images", "training")
COLOURS = (figures.OTHER_COLOURS[1], figures.LAYER_HYBRID_COLOUR, figures.TRANSMAMBA_COLOUR, *figures.OTHER_COLOURS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierRow:
    """A model and its scores. top_1, top_5, from_teacher: shares between 0 and 1. loss: nats an image. num_images: that
    it learnt from. seconds: of its training. curve: (step, loss of the task in training)."""

    name: str
    top_1: float
    top_5: float
    loss: float
    num_parameters: int
    from_teacher: float
    num_images: int
    seconds: float
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionQuickstartReport:
    """Scores of a teacher and of students on the same num_images images; the last student is the adapted one, and
    confusion and cka are its own.
    """

    teacher: ClassifierRow
    students: tuple[ClassifierRow, ...]
    num_images: int
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    cka: tuple[tuple[float, ...], ...]
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    seed: int
    command: str
    date: str
    seconds: float

    def __post_init__(self) -> None:
        if not self.students:
            raise InputError("students is empty; a report compares at least one with the teacher.")

    def headline(self) -> str:
        """What came out, in a sentence."""
        adapted = self.students[-1]
        others = ", ".join(f"{_percent(row.top_1)} {row.name}" for row in self.students[:-1])
        return (
            f"A Mamba of {format_count(adapted.num_parameters)} parameters, made out of a Transformer with "
            f"{adapted.num_images:,} images, names {_percent(adapted.top_1)} of {self.num_images:,} others right; its "
            f"teacher, which had {self.teacher.num_images:,}, {_percent(self.teacher.top_1)}"
            + (f". The same Mamba: {others}." if others else ".")
        )

    def rows(self) -> list[list[str]]:
        """A row for each model, under HEADERS."""
        return [
            [
                row.name,
                _percent(row.top_1),
                _percent(row.top_5),
                f"{row.loss:.3f}",
                format_count(row.num_parameters),
                _percent(row.from_teacher) if row.from_teacher else "",
                f"{row.num_images:,}",
                format_seconds(row.seconds),
            ]
            for row in (self.teacher, *self.students)
        ]

    def to_json(self) -> str:
        """Text that `from_json` reads; a number that is not finite is written as null."""
        return json.dumps(without_nan(asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote.

        Raises:
            InputError: it is no such text.
        """
        try:
            content = json.loads(text)
            return cls(
                **content
                | {
                    "teacher": _row(content["teacher"]),
                    "students": tuple(map(_row, content["students"])),
                    "classes": tuple(content["classes"]),
                    "confusion": tuple(map(tuple, content["confusion"])),
                    "cka": tuple(map(tuple, content["cka"])),
                }
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"This is not the JSON of a vision quickstart report: {error}.") from error

    def write_json(self, path: str | Path) -> Path:
        return write_text(path, self.to_json() + "\n")

    def write_html(self, path: str | Path) -> Path:
        """Write the page and return its path."""
        return self.page().write(path)

    def page(self) -> Page:
        """The report as a page."""
        page = Page("TransMamba quickstart: images", subtitle=f"{self.date}, {format_seconds(self.seconds)}")
        page.finding(self.headline())
        rows = self.rows()
        page.table(HEADERS, rows, strong_rows=[len(rows) - 1], caption=self._caption())
        page.section("Learning")
        curves = {row.name: list(row.curve) for row in self.students if row.curve}
        if curves:
            colours = dict(zip(curves, COLOURS, strict=False))
            page.figure(
                figures.loss_curves(
                    curves, colours=colours, what="loss of the labels", unit="nats an image", x_label="step"
                ),
                "How well each student fits the labels of its training images, lower is better.",
            )
        page.section("What the adapted student takes for what")
        page.figure(
            confusion_figure(self.confusion, self.classes), "Share of each class's images taken for each class."
        )
        page.figure(
            alignment_figure(self.cka),
            "Linear CKA of the mean token after each layer of the adapted student and each block of its teacher; 1 "
            "where one is the other turned and scaled.",
        )
        page.section("How this was made")
        page.code(self.command)
        details = {**self.settings, "seed": str(self.seed), "date": self.date, **self.versions}
        page.table(["", ""], [[name, value] for name, value in details.items()], text_columns=2)
        return page

    def print_table(self, console: "Console") -> None:
        """Print the table and the headline on a rich console."""
        print_rows(console, HEADERS, self.rows())
        print_points(console, self.headline(), [])

    def _caption(self) -> str:
        return (
            f"Measured on {self.num_images:,} images that no model was trained on, of which one is "
            f"{_percent(1 / self.num_images)}. Loss: nats an image. From the teacher: parameters that began as the "
            "teacher's. Images: that it learnt from."
        )


def _row(content: dict[str, Any]) -> ClassifierRow:
    curve = tuple((step, nan if loss is None else loss) for step, loss in content["curve"])
    return ClassifierRow(**content | {"curve": curve})


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
