"""The report of a quickstart: a small Transformer is trained, converted and distilled, and each step has its numbers.

`QuickstartReport` holds three measurements of the student against its teacher (converted with no layer switching,
switched but untrained, distilled) and what is a quickstart's own: how the teacher learnt, what the conversion changed,
how the student learnt, and text that it wrote. Every sentence is made from the numbers and holds for any numbers.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transmamba.errors import InputError
from transmamba.report import figures
from transmamba.report.html import Mark, Page, write_text
from transmamba.report.student import (
    STUDENT,
    TEACHER,
    MeasuredModel,
    StudentMeasurements,
    as_percent,
    as_times,
    measurements_from_json,
    print_points,
    print_rows,
    without_nan,
)
from transmamba.report.units import format_bytes, format_count, format_seconds
from transmamba.schedule import TransPointSchedule

if TYPE_CHECKING:
    from rich.console import Console

LearningCurve = tuple[tuple[int, float, float], ...]  # (tokens read, seconds, nats per token)


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossedSample:
    """Text that a model wrote past its TransPoints.

    Each piece is (position of its first token, text); the first begins where the prompt ends. A TransPoint is marked
    before the first piece that begins at or after it, so pieces should begin at the TransPoints, or be single tokens.
    """

    prompt: str
    pieces: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        pieces = tuple((position, text) for position, text in self.pieces)
        if not pieces:
            raise InputError(f"The sample after {self.prompt!r} has no pieces; give at least the first written token.")
        positions = [position for position, _ in pieces]
        if positions[0] < 0 or sorted(set(positions)) != positions:
            raise InputError(
                f"Positions of the pieces must be >= 0 and increase; those after {self.prompt!r} are {positions}."
            )
        object.__setattr__(self, "pieces", pieces)

    def marked(self, schedule: TransPointSchedule) -> list[str | Mark]:
        """The pieces with a label wherever layers of `schedule` switch."""
        parts: list[str | Mark] = []
        previous = max(self.pieces[0][0] - 1, 0)
        for position, text in self.pieces:
            for point in sorted({entry for entry in schedule if entry is not None and previous < entry <= position}):
                states = schedule.modes_at(point).count("ssm")
                parts.append(Mark(f"token {point:,}: {states} of {len(schedule)} layers are SSM now"))
            parts.append(text)
            previous = position
        return parts

    def crossed_in_prompt(self, schedule: TransPointSchedule) -> list[int]:
        """TransPoints that lie within the prompt, past its first token."""
        start = self.pieces[0][0]
        return sorted({entry for entry in schedule if entry is not None and 0 < entry < start})


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartReport:
    """Measurements of a quickstart.

    converted, untrained, distilled: the student with every TransPoint at none, at its schedule as the conversion left
        it, and at its schedule after distillation; all against one teacher, on the same windows.
    difference: the conversion's: the largest of a logit over the largest logit, with every TransPoint at none.
    training: the teacher's loss. distillation: KL(teacher || student) while the whole student learns.
    settings: how teacher and student were trained, in words.
    """

    schedule: str  # its name, such as "V9"
    converted: StudentMeasurements
    untrained: StudentMeasurements
    distilled: StudentMeasurements
    difference: float
    training: LearningCurve
    distillation: LearningCurve
    samples: tuple[CrossedSample, ...]
    corpus: str
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    seed: int
    command: str
    date: str
    seconds: float  # of the whole quickstart

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", tuple(self.samples))
        object.__setattr__(self, "settings", dict(self.settings))
        object.__setattr__(self, "versions", dict(self.versions))
        for name in ("training", "distillation"):
            rows = tuple(tuple(row) for row in getattr(self, name))
            for row in rows:
                if len(row) != 3:
                    raise InputError(f"{name} has the row {row}; rows have 3 numbers.")
            object.__setattr__(self, name, rows)
        if set(self.converted.own.trans_points) != {None}:
            raise InputError(
                f"converted has the TransPoints {self.converted.own.trans_points}; they must all be none, since it is "
                "the student while it is its teacher."
            )
        if self.untrained.own.trans_points != self.distilled.own.trans_points:
            raise InputError(
                f"untrained has the TransPoints {self.untrained.own.trans_points} and distilled "
                f"{self.distilled.own.trans_points}; they must be the same, since only training lies between."
            )

    def steps(self) -> list[str]:
        """What each step did, in a sentence each."""
        return [_trained(self), _converted(self), _switched(self), _distilled(self)]

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """The headers and rows of the main table, a model a row."""
        return _headers(self), _rows(self)

    def to_json(self) -> str:
        """Text that `from_json` reads; a number that is not finite is written as null."""
        return json.dumps(without_nan(asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote."""
        try:
            content = json.loads(text)
            measured = {name: measurements_from_json(content[name]) for name in ("converted", "untrained", "distilled")}
            curves = {name: _curve_from_json(content[name]) for name in ("training", "distillation")}
            samples = tuple(CrossedSample(**sample) for sample in content["samples"])
            difference = nan if content["difference"] is None else content["difference"]
            return cls(**content | measured | curves | {"samples": samples, "difference": difference})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"This is not the JSON of a quickstart report: {error}.") from error

    def write_json(self, path: str | Path) -> Path:
        return write_text(path, self.to_json() + "\n")

    def write_html(self, path: str | Path) -> Path:
        """Write the page and return its path."""
        return self.page().write(path)

    def page(self) -> Page:
        """The report as a page: findings, the table, then how each was found."""
        page = Page("TransMamba quickstart", subtitle=f"{self.date}, {format_seconds(self.seconds)}, {self.corpus}")
        findings = self.distilled.findings()
        page.finding(findings.headline)
        page.points("Steps", self.steps())
        headers, rows = self.summary()
        page.table(headers, rows, strong_rows=[len(rows) - 1], caption=_caption(self))
        for label, sentences in findings.groups:
            page.points(label, sentences)
        _add_learning(page, self)
        self.distilled.add_to(page, tasks=self.distilled.known_tasks)
        _add_samples(page, self)
        _add_details(page, self)
        return page

    def print_table(self, console: "Console") -> None:
        """Print the summary and the findings on a rich console."""
        headers, rows = self.summary()
        print_rows(console, headers, rows)
        findings = self.distilled.findings()
        print_points(console, findings.headline, [("Steps", tuple(self.steps())), *findings.groups])


def _trained(report: QuickstartReport) -> str:
    teacher = report.converted.teacher
    return (
        f"The teacher, a Transformer ({teacher.kind}, {format_count(teacher.num_parameters)} parameters), "
        f"{_learnt(report.training)}: {_loss(teacher.bits_per_byte)} bits per byte of unseen text."
    )


def _converted(report: QuickstartReport) -> str:
    return (
        "The student is that model converted to a TransMamba. While no layer switches, its logits differ from the "
        f"teacher's by at most {report.difference:.2g} of the largest, and {_same(report.converted)}."
    )


def _switched(report: QuickstartReport) -> str:
    ratio = _ratio(report.untrained.own.perplexity_ratio)
    return (
        f"Switched to {report.schedule} with nothing trained, its perplexity is {ratio} the teacher's, and "
        f"{_same(report.untrained)}."
    )


def _distilled(report: QuickstartReport) -> str:
    ratio = _ratio(report.distilled.own.perplexity_ratio)
    return (
        f"Distilled, it {_learnt(report.distillation)}: its perplexity is {ratio} the teacher's, and "
        f"{_same(report.distilled)}."
    )


def _same(measured: StudentMeasurements) -> str:
    return f"{as_percent(measured.own.top1)} of its next tokens are the same"


def _learnt(curve: LearningCurve) -> str:
    if not curve:
        return "was not trained"
    tokens, seconds, _ = curve[-1]
    return f"read {format_count(tokens)} tokens in {format_seconds(seconds)}"


def _headers(report: QuickstartReport) -> list[str]:
    length = _longest(report)
    at = "" if length is None else f" at {length:,}"
    return ["model", "bits per byte", "perplexity", "same next token", "KL", f"tokens/s{at}", f"cache{at}"]


def _rows(report: QuickstartReport) -> list[list[str]]:
    teacher = report.distilled.teacher
    rows = [["Transformer", *_quality(teacher), "", "", *_speed(teacher, _longest(report))]]
    for name, measured in (
        ("converted", report.converted),
        (f"switched to {report.schedule}", report.untrained),
        (f"distilled to {report.schedule}", report.distilled),
    ):
        student, own = measured.student, measured.own
        agreement = [as_percent(own.top1), _loss(own.kl)]
        rows.append([name, *_quality(student), *agreement, *_speed(student, _longest(report))])
    return rows


def _caption(report: QuickstartReport) -> str:
    measured = report.distilled
    return (
        f"Measured on {measured.num_tokens:,} tokens that no model was trained on, in windows of "
        f"{measured.seq_len:,}; lower bits, perplexity and KL are better. Same next token, and KL in nats per token: "
        f"against the Transformer. Converted: no layer switches. Switched to {report.schedule}: nothing trained. "
        "Tokens/s: writing one at a time, one sequence. Cache: what is kept in between."
    )


def _quality(model: MeasuredModel) -> list[str]:
    return [_loss(model.bits_per_byte), f"{model.perplexity:.2f}" if isfinite(model.perplexity) else "not finite"]


def _speed(model: MeasuredModel, length: int | None) -> list[str]:
    for row in model.speed:
        if row.length == length:
            return [format_count(row.decode_tokens_per_second), format_bytes(row.cache_bytes)]
    return ["", ""]


def _longest(report: QuickstartReport) -> int | None:
    """The longest context at which both teacher and distilled student were timed."""
    theirs, ours = (
        {row.length for row in model.speed} for model in (report.distilled.teacher, report.distilled.student)
    )
    return max(theirs & ours, default=None)


def _add_learning(page: Page, report: QuickstartReport) -> None:
    colours = figures.model_colours({TEACHER: (None,), STUDENT: report.distilled.own.trans_points})
    page.section("Learning")
    if report.training:
        page.figure(
            figures.loss_curves({TEACHER: _points(report.training)}, colours=colours),
            "The Transformer's training loss against the tokens it has read, lower is better; neighbouring steps are "
            "averaged where there are many.",
        )
    if report.distillation:
        page.figure(
            figures.loss_curves(
                {STUDENT: _points(report.distillation)}, colours=colours, what="KL(teacher || student)"
            ),
            "How far the student's probabilities are from the teacher's while its layers learn together; 0 is equal. "
            "It begins with TransPoints at the end, where it is its teacher, and rises while they come down to "
            f"{report.schedule}. The tokens before the line were read to fit layers one by one.",
        )


def _add_samples(page: Page, report: QuickstartReport) -> None:
    if not report.samples:
        return
    page.section("Text")
    schedule = report.distilled.own.trans_points
    for sample in report.samples:
        crossed = sample.crossed_in_prompt(schedule)
        within = f" TransPoints within the prompt: {', '.join(map(str, crossed))}." if crossed else ""
        page.paragraph(
            "Written by the distilled student after the prompt in grey, which ends before token "
            f"{sample.pieces[0][0]:,}. Labels stand where layers switch to the SSM.{within}"
        )
        page.sample(sample.marked(schedule), prompt=sample.prompt)


def _add_details(page: Page, report: QuickstartReport) -> None:
    page.section("How this was made")
    page.code(report.command)
    page.table(
        ["", ""],
        [
            ["corpus", report.corpus],
            ["TransPoints", str(report.distilled.own.trans_points).replace(",", ", ")],
            *([name, value] for name, value in report.settings.items()),
            ["seed", str(report.seed)],
            ["date", report.date],
            ["total time", format_seconds(report.seconds)],
            *([name, version] for name, version in report.versions.items()),
        ],
        text_columns=2,
    )


def _points(curve: LearningCurve) -> list[tuple[float, float]]:
    return [(tokens, loss) for tokens, _, loss in curve]


def _ratio(ratio: float) -> str:
    """To three digits behind the point where a student may be within a percent of its teacher."""
    return f"{ratio:.3f} times" if ratio < 10 else as_times(ratio)


def _loss(loss: float) -> str:
    return f"{round(loss, 3) + 0.0:.3f}" if isfinite(loss) else "not finite"  # never -0.000


def _curve_from_json(rows: list[list[Any]]) -> LearningCurve:
    """The curve, with every null read as a number that was not finite."""
    return tuple(
        (tokens, nan if seconds is None else seconds, nan if loss is None else loss) for tokens, seconds, loss in rows
    )
