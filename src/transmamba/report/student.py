"""The report of a student against its teacher: what was kept, what was gained and what it costs.

`StudentMeasurements` holds what was measured and nothing else, and `StudentReport` adds where it came from; it is
written as JSON, as an HTML page and as a table in the terminal. Every sentence is made from the numbers and holds for
any numbers. What a measure cannot tell apart from no change is not called one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import exp, isfinite, isnan, nan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transmamba.errors import InputError
from transmamba.report import figures
from transmamba.report.html import Page, write_text
from transmamba.report.units import format_bytes, format_count, format_seconds
from transmamba.schedule import TransPointSchedule

if TYPE_CHECKING:
    from rich.console import Console

TEACHER, STUDENT = "teacher", "student"
# Below these a difference is not worth a sentence of its own kind: a loss by so many nats, a speed by so much of it.
SMALL_LOSS, SMALL_SPEED = 0.002, 0.05
SIGMAS = 2.0  # standard errors beyond which a difference is called one: 1 time in 20 by accident


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallRow:
    """Recall of one task at one length, of facts at one depth, or at all where depth is None; means over `count`."""

    task: str
    length: int
    depth: float | None
    count: int
    exact: float  # share of answers that greedy decoding writes
    chosen: float  # share of prompts whose answer is likelier than every other choice
    loss: float  # of the answer, nats per token
    chance: float  # what a guess would choose


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedRow:
    """Speed and memory at one length of context. peak_bytes: None where the device does not count."""

    length: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AgreementRow:
    """Agreement over the predictions made at positions start <= position < end."""

    start: int
    end: int
    kl: float
    top1: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredModel:
    """One of the two. trans_points: None for a model that is no TransMamba."""

    kind: str  # model_type
    trans_points: TransPointSchedule | None
    num_parameters: int
    nats_per_token: float
    bits_per_byte: float
    loss_by_position: tuple[tuple[float, float], ...]  # (position in the document, nats per token)
    recall: tuple[RecallRow, ...]  # by length
    recall_by_depth: tuple[RecallRow, ...]  # by length and depth
    speed: tuple[SpeedRow, ...]

    @property
    def perplexity(self) -> float:
        return exp(min(self.nats_per_token, 700))  # what is larger is not a number any more

    def recalled(self, task: str) -> RecallRow | None:
        """The means over all lengths; None where the task was not asked."""
        return _pooled([row for row in self.recall if row.task == task])


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredSchedule:
    """The student under one schedule, against the teacher.

    loss_difference: nats per token, the student's less the teacher's; standard_error is its own. attention_share: of
    layer-tokens, in a document of seq_len tokens.
    """

    trans_points: TransPointSchedule
    attention_share: float
    nats_per_token: float
    bits_per_byte: float
    loss_difference: float
    standard_error: float
    kl: float
    top1: float

    @property
    def perplexity_ratio(self) -> float:
        return exp(min(self.loss_difference, 700))


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What the numbers say, in whole sentences, by what they mean for somebody who would use the student."""

    headline: str
    kept: tuple[str, ...]
    gained: tuple[str, ...]
    costs: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def groups(self) -> list[tuple[str, tuple[str, ...]]]:
        """The groups that are not empty, with their labels."""
        labelled = [
            ("Kept", self.kept),
            ("Gained", self.gained),
            ("It costs", self.costs),
            ("Not known", self.unknown),
        ]
        return [(label, sentences) for label, sentences in labelled if sentences]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentMeasurements:
    """A teacher and its student, measured on the same text.

    schedules: the student's own first, then others, each nearer to attention throughout. agreement: by position, under
    the student's own schedule.
    """

    seq_len: int
    num_tokens: int
    teacher: MeasuredModel
    student: MeasuredModel
    schedules: tuple[MeasuredSchedule, ...]
    agreement: tuple[AgreementRow, ...]

    def __post_init__(self) -> None:
        if not self.schedules:
            raise InputError("schedules is empty; the first is the student's own.")
        if self.student.trans_points != self.schedules[0].trans_points:
            raise InputError(
                f"The first of schedules is {self.schedules[0].trans_points} and the student's own is "
                f"{self.student.trans_points}; they must be the same."
            )

    @property
    def own(self) -> MeasuredSchedule:
        """The student under its own schedule."""
        return self.schedules[0]

    @property
    def tasks(self) -> list[str]:
        """Recall tasks that both were asked."""
        asked = {row.task for row in self.teacher.recall}
        return list(dict.fromkeys(row.task for row in self.student.recall if row.task in asked))

    @property
    def known_tasks(self) -> list[str]:
        """Recall tasks at which one of the two does better than guessing."""
        pairs = {task: (self.teacher.recalled(task), self.student.recalled(task)) for task in self.tasks}
        return [task for task, rows in pairs.items() if any(row is not None and _above_chance(row) for row in rows)]

    def findings(self) -> Findings:
        sorted_out: dict[str, list[str]] = {"kept": [], "gained": [], "costs": [], "unknown": []}
        for kind, sentence in [
            *_quality_points(self),
            *_schedule_points(self),
            *_recall_points(self),
            *_memory_points(self),
            *_speed_points(self),
        ]:
            sorted_out[kind].append(sentence)
        return Findings(headline=_headline(self), **{kind: tuple(points) for kind, points in sorted_out.items()})

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """The headers and rows of a table: measure, teacher, student, and the student's as a multiple."""
        return [" ", TEACHER, STUDENT, "ratio"], _summary_rows(self)

    def add_to(self, page: Page, *, tasks: Sequence[str] | None = None) -> None:
        """Add the sections that show how each finding was found. tasks: of recall, those to show; None = all."""
        _add_schedule(page, self)
        _add_quality(page, self)
        _add_positions(page, self)
        _add_recall(page, self, self.tasks if tasks is None else tasks)
        _add_speed(page, self)

    def print_table(self, console: "Console") -> None:
        """Print the summary and the findings on a rich console."""
        print_rows(console, *self.summary())
        findings = self.findings()
        print_points(console, findings.headline, findings.groups)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentReport:
    """Measurements, with what somebody needs to repeat them. student, teacher, text: as they were named."""

    student: str
    teacher: str
    text: str
    measured: StudentMeasurements
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    device: str
    command: str
    date: str
    seconds: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", dict(self.settings))
        object.__setattr__(self, "versions", dict(self.versions))

    def to_json(self) -> str:
        """Text that `from_json` reads; a number that is not finite is written as null."""
        return json.dumps(without_nan(asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote."""
        try:
            content = json.loads(text)
            return cls(**content | {"measured": measurements_from_json(content["measured"])})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"This is not the JSON of a report on a student: {error}.") from error

    def write_json(self, path: str | Path) -> Path:
        return write_text(path, self.to_json() + "\n")

    def write_html(self, path: str | Path) -> Path:
        """Write the page and return its path."""
        return self.page().write(path)

    def page(self) -> Page:
        """The report as a page: findings, the table, then how each was found."""
        measured = self.measured
        page = Page(
            "A student and its teacher", subtitle=f"{_name(self.student)} against {_name(self.teacher)}, {self.date}"
        )
        findings = measured.findings()
        page.finding(findings.headline)
        for label, sentences in findings.groups:
            page.points(label, sentences)
        headers, rows = measured.summary()
        page.table(headers, rows, caption=_summary_caption(measured, self.text))
        measured.add_to(page)
        page.section("How this was made")
        page.code(self.command)
        page.table(["", ""], self._details(), text_columns=2)
        return page

    def print_table(self, console: "Console") -> None:
        """Print the summary and the findings on a rich console."""
        self.measured.print_table(console)

    def _details(self) -> list[list[str]]:
        return [
            ["student", f"{self.student}, {format_count(self.measured.student.num_parameters)} parameters"],
            ["its TransPoints", str(self.measured.own.trans_points).replace(",", ", ")],
            ["teacher", f"{self.teacher} ({self.measured.teacher.kind})"],
            ["text", self.text],
            *([name, value] for name, value in self.settings.items()),
            ["device", self.device],
            *([name, version] for name, version in self.versions.items()),
            ["total time", format_seconds(self.seconds)],
        ]


def print_rows(console: "Console", headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, header in enumerate(headers):
        table.add_column(header, justify="right" if column else "left", no_wrap=column == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def print_points(console: "Console", headline: str, groups: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print a sentence, then sentences under labels."""
    console.print()
    console.print(headline, markup=False, highlight=False)
    for label, sentences in groups:
        console.print(f"\n[bold]{label}[/bold]")
        for sentence in sentences:
            console.print(f"  {sentence}", markup=False, highlight=False)


def _headline(measured: StudentMeasurements) -> str:
    teacher, student = measured.teacher, measured.student
    quality = (
        f"The student's perplexity is {as_times(measured.own.perplexity_ratio)} its teacher's "
        f"({_perplexity(student)} against {_perplexity(teacher)})"
        if isfinite(measured.own.perplexity_ratio)
        else "The student has no finite perplexity"
    )
    pair = _at_longest(measured)
    if pair is None:
        return f"{quality}."
    theirs, ours = pair
    return (
        f"{quality}. After {ours.length:,} tokens of text it keeps {format_bytes(ours.cache_bytes)} in memory where "
        f"the teacher keeps {format_bytes(theirs.cache_bytes)}."
    )


def _quality_points(measured: StudentMeasurements) -> list[tuple[str, str]]:
    own = measured.own
    if not isfinite(own.loss_difference):
        return [("costs", "The loss is not finite: the student, or its teacher, cannot be used on this text.")]
    ratio = own.perplexity_ratio
    error = 0.0 if isnan(own.standard_error) else SIGMAS * own.standard_error
    spread = f" (between {exp(own.loss_difference - error):.3f} and {exp(own.loss_difference + error):.3f})"
    spread = spread if error else ""
    over = f"measured over {measured.num_tokens:,} tokens"
    points = []
    if abs(own.loss_difference) <= max(error, SMALL_LOSS):
        points.append(("kept", f"Perplexity is the teacher's: {ratio:.3f} times as high{spread}, {over}."))
    else:
        kind, word = ("costs", "higher") if own.loss_difference > 0 else ("gained", "lower")
        points.append((kind, f"Perplexity is {word}: {ratio:.3f} times the teacher's{spread}, {over}."))
    same = f"{as_percent(own.top1)} of tokens"
    if own.top1 >= 0.99:
        points.append(("kept", f"For {same} it would write the same next token as the teacher."))
    else:
        points.append(
            (
                "costs",
                f"It would write the same next token as the teacher for {same}, and another one for the rest; the KL "
                f"divergence is {own.kl:.3f} nats per token.",
            )
        )
    return points


def _schedule_points(measured: StudentMeasurements) -> list[tuple[str, str]]:
    points = []
    last = measured.schedules[-1]
    if last is not measured.own and set(last.trans_points) == {None}:
        error = 0.0 if isnan(last.standard_error) else SIGMAS * last.standard_error
        if abs(last.loss_difference) <= max(error, SMALL_LOSS):
            points.append(("kept", "With every TransPoint at none, the same weights have the teacher's perplexity."))
        elif last.loss_difference > 0:
            points.append(
                (
                    "costs",
                    f"Even with every TransPoint at none its perplexity is {last.perplexity_ratio:.3f} times the "
                    "teacher's: training has moved the weights that attention uses.",
                )
            )
        else:
            points.append(
                (
                    "gained",
                    f"With every TransPoint at none its perplexity is {last.perplexity_ratio:.3f} times the teacher's.",
                )
            )
    if len(measured.schedules) > 2:
        losses = [schedule.nats_per_token for schedule in measured.schedules]
        rises = [later - earlier for earlier, later in pairwise(losses)]
        if all(rise <= 0 for rise in rises):
            points.append(
                (
                    "gained",
                    f"Its schedule can be set at any time: at {len(losses)} of them, from its own to none, more "
                    "attention always gave a lower perplexity.",
                )
            )
        else:
            points.append(
                (
                    "costs",
                    f"More attention does not always help: of {len(rises)} steps from its own schedule to none, "
                    f"{sum(rise > 0 for rise in rises)} raised the perplexity, so other schedules than its own are no "
                    "safe choice.",
                )
            )
    return points


def _recall_points(measured: StudentMeasurements) -> list[tuple[str, str]]:
    points = []
    for task in measured.tasks:
        theirs, ours = measured.teacher.recalled(task), measured.student.recalled(task)
        assert theirs is not None
        assert ours is not None
        lengths = sorted({row.length for row in measured.student.recall if row.task == task})
        choices = round(1 / ours.chance)
        where = f"{_capital(task)} recall at {_range(lengths)} tokens of context"
        numbers = (
            f"The student finds the right one of {choices} answers the likeliest {as_percent(ours.chosen)} of the "
            f"time, and writes it exactly {as_percent(ours.exact)}; the teacher {as_percent(theirs.chosen)} and "
            f"{as_percent(theirs.exact)}. Guessing gives {100 * ours.chance:.3g} % ({ours.count} questions)."
        )
        changes = [_change(theirs, ours, measure) for measure in ("chosen", "exact")]
        if task not in measured.known_tasks:
            points.append(
                ("unknown", f"{where}: neither model does better than guessing, so nothing can be said. {numbers}")
            )
        elif not any(changes):
            points.append(("kept", f"{where}, as far as {ours.count} questions can tell. {numbers}"))
        else:
            points.append(("costs" if min(changes) < 0 else "gained", f"{where}. {numbers}"))
    return points


def _memory_points(measured: StudentMeasurements) -> list[tuple[str, str]]:
    pair = _at_longest(measured)
    if pair is None or not pair[0].cache_bytes:
        return []
    theirs, ours = pair
    share = ours.cache_bytes / theirs.cache_bytes
    sizes = f"{format_bytes(ours.cache_bytes)} against {format_bytes(theirs.cache_bytes)}"
    text = f"At {ours.length:,} tokens its cache takes {as_percent(share)} of the teacher's memory ({sizes})"
    entries = measured.own.trans_points
    never = sum(entry is None for entry in entries)
    last = max((entry for entry in entries if entry is not None), default=0)
    if never:
        text += (
            f", and goes on growing: {never} of {len(entries)} layers never {'switch' if never > 1 else 'switches'}."
        )
    elif last <= ours.length:
        text += ", and does not grow any more, however long the text."
    else:
        text += f", and stops growing at token {last:,}."
    kind = "gained" if share < 1 - SMALL_SPEED else "costs" if share > 1 + SMALL_SPEED else "kept"
    return [(kind, text)]


def _speed_points(measured: StudentMeasurements) -> list[tuple[str, str]]:
    pair = _at_longest(measured)
    if pair is None:
        return []
    theirs, ours = pair
    points = []
    for doing, our_speed, their_speed in (
        ("Writing", ours.decode_tokens_per_second, theirs.decode_tokens_per_second),
        ("Reading", ours.prefill_tokens_per_second, theirs.prefill_tokens_per_second),
    ):
        ratio = our_speed / their_speed
        words = f"{format_count(our_speed)} tokens per second against {format_count(their_speed)}"
        at = f"after {ours.length:,} tokens" if doing == "Writing" else f"{ours.length:,} tokens at once"
        if abs(ratio - 1) <= SMALL_SPEED:
            points.append(("kept", f"{doing} {at} is as fast as the teacher's: {words}."))
        else:
            kind, word = ("gained", "faster") if ratio > 1 else ("costs", "slower")
            factor = max(ratio, 1 / ratio)
            points.append((kind, f"{doing} {at} is {factor:.2f} times {word}: {words}."))
    return points


def _summary_rows(measured: StudentMeasurements) -> list[list[str]]:
    teacher, student, own = measured.teacher, measured.student, measured.own
    rows = [
        _row("parameters", teacher.num_parameters, student.num_parameters, format_count),
        _row("perplexity", teacher.perplexity, student.perplexity, _two_digits),
        _row("bits per byte", teacher.bits_per_byte, student.bits_per_byte, _three_digits),
        ["same next token", "", as_percent(own.top1), ""],
        ["KL from the teacher, nats/token", "", _three_digits(own.kl), ""],
    ]
    for task in measured.tasks:
        theirs, ours = teacher.recalled(task), student.recalled(task)
        assert theirs is not None
        assert ours is not None
        of = f"right choice of {round(1 / ours.chance)}"
        rows += [
            [f"{task}: {of}", as_percent(theirs.chosen), as_percent(ours.chosen), ""],
            [f"{task}: written exactly", as_percent(theirs.exact), as_percent(ours.exact), ""],
            _row(f"{task}: loss, nats/token", theirs.loss, ours.loss, _two_digits),
        ]
    pair = _at_longest(measured)
    if pair is not None:
        first, second = pair
        at = f"at {first.length:,}"
        rows += [
            _row(
                f"writing {at}, tokens/s",
                first.decode_tokens_per_second,
                second.decode_tokens_per_second,
                format_count,
            ),
            _row(
                f"reading {at}, tokens/s",
                first.prefill_tokens_per_second,
                second.prefill_tokens_per_second,
                format_count,
            ),
            _row(f"cache {at}", first.cache_bytes, second.cache_bytes, format_bytes),
        ]
        if first.peak_bytes is not None and second.peak_bytes is not None:
            rows.append(_row(f"peak memory {at}", first.peak_bytes, second.peak_bytes, format_bytes))
    return rows


def _summary_caption(measured: StudentMeasurements, text: str) -> str:
    parts = [
        f"Perplexity says how much a text surprises a model; lower is better, 1 is not at all. Measured on "
        f"{measured.num_tokens:,} tokens of {text}, in windows of {measured.seq_len:,}."
    ]
    if measured.tasks:
        lengths = sorted({row.length for row in measured.student.recall})
        parts.append(f"Needle and phone-book are explained below; means over contexts of {_range(lengths)} tokens.")
    if measured.student.speed:
        parts.append("Reading is of a whole prompt, writing one token at a time, the cache what is kept in between.")
    return " ".join(parts)


def _add_schedule(page: Page, measured: StudentMeasurements) -> None:
    page.section("Where the student is attention")
    share = measured.own.attention_share
    page.figure(
        figures.schedule_figure(measured.own.trans_points, measured.seq_len),
        f"Every layer mixes tokens by attention, as the teacher does, up to its TransPoint, and by a state space from "
        f"there on. In a document of {measured.seq_len:,} tokens attention does {as_percent(share)} of the mixing.",
    )


def _add_quality(page: Page, measured: StudentMeasurements) -> None:
    page.section("Quality against schedule")
    page.paragraph(
        "The schedule of a student can be changed at any time. Here the same weights run under its own schedule and "
        "under others on the way to attention in every layer. Lower perplexity is better."
    )
    if len(measured.schedules) > 1:
        page.figure(
            figures.quality_by_schedule(
                {STUDENT: [(row.attention_share, exp(min(row.nats_per_token, 700))) for row in measured.schedules]},
                colours=_colours(measured),
                level=(TEACHER, measured.teacher.perplexity),
                what="perplexity",
            ),
            "Perplexity against how much of the mixing attention does. The leftmost point is the student's own "
            "schedule, the dashed line the teacher.",
        )
    page.table(
        ["TransPoints", "attention", "perplexity", "of the teacher's", "KL", "same next token"],
        [
            [
                _short(row.trans_points),
                as_percent(row.attention_share),
                _two_digits(exp(min(row.nats_per_token, 700))),
                as_times(row.perplexity_ratio),
                _three_digits(row.kl),
                as_percent(row.top1),
            ]
            for row in measured.schedules
        ],
        strong_rows=[0],
        caption="TransPoints by layer, from the input. KL in nats per token.",
    )


def _add_positions(page: Page, measured: StudentMeasurements) -> None:
    colours, points = _colours(measured), measured.own.trans_points
    page.section("Quality along the document")
    if measured.student.loss_by_position:
        page.figure(
            figures.loss_by_position(
                {TEACHER: measured.teacher.loss_by_position, STUDENT: measured.student.loss_by_position},
                colours=colours,
                trans_points=points,
            ),
            "The loss of both by position: the more of a document a model has read, the better it should predict. "
            "Where the student stays behind, it has lost what stood far back. Dotted lines are its TransPoints.",
        )
    if measured.agreement:
        for what, values, is_share, words in (
            (
                "same next token",
                [((row.start + row.end - 1) / 2, row.top1) for row in measured.agreement],
                True,
                "For how many tokens the student's likeliest next token is the teacher's, by position.",
            ),
            (
                "KL(teacher || student), nats per token",
                [((row.start + row.end - 1) / 2, row.kl) for row in measured.agreement],
                False,
                "How far the student's probabilities are from the teacher's, by position; 0 is equal.",
            ),
        ):
            page.figure(
                figures.position_figure(
                    {STUDENT: values}, colours=colours, what=what, trans_points=points, bottom=0, is_share=is_share
                ),
                words,
            )


def _add_recall(page: Page, measured: StudentMeasurements, tasks: Sequence[str]) -> None:
    if not tasks:
        return
    page.section("Recall")
    page.paragraph(
        "needle: a sentence such as “Ada Baker was born in the city of Oslo” is hidden in real text, and its beginning "
        "is repeated at the end; the wrong answers are other cities. phone-book: lines of a name and a number, and a "
        "name at the end; the wrong answers are other numbers of the same book. An answer is right if the model finds "
        "it likelier than each of the others."
    )
    colours = _colours(measured)
    models = {TEACHER: measured.teacher, STUDENT: measured.student}
    chance = {task: row.chance for task in tasks if (row := measured.student.recalled(task))}
    page.figure(
        figures.recall_figure(
            {
                task: {
                    name: [(row.length, row.chosen) for row in model.recall if row.task == task]
                    for name, model in models.items()
                }
                for task in tasks
            },
            colours=colours,
            chance=chance,
            x_label="context (tokens)",
            is_length=True,
        ),
        "Right choices against the length of the context, facts at all depths.",
    )
    by_depth = {
        task: {name: _by_depth(model.recall_by_depth, task) for name, model in models.items()} for task in tasks
    }
    by_depth_rows = [row for row in measured.student.recall_by_depth if row.task in tasks]
    if all(len(points) > 1 for curves in by_depth.values() for points in curves.values()):
        page.figure(
            figures.recall_figure(
                by_depth, colours=colours, chance=chance, x_label="place of the fact", is_length=False
            ),
            "Right choices against the place of the fact: 0 % stands first in the context, 100 % just before the "
            f"question. All lengths together; a point is known to about {_known_to(_fewest(by_depth_rows))} percentage "
            "points either way.",
        )
    rows = []
    for ours in (row for row in measured.student.recall if row.task in tasks):
        match = [row for row in measured.teacher.recall if (row.task, row.length) == (ours.task, ours.length)]
        if match:
            theirs = match[0]
            layers = measured.own.trans_points.modes_at(ours.length - 1).count("attention")
            rows.append(
                [
                    ours.task,
                    f"{ours.length:,}",
                    f"{layers} of {len(measured.own.trans_points)}",
                    f"{as_percent(theirs.chosen)} / {as_percent(ours.chosen)}",
                    f"{as_percent(theirs.exact)} / {as_percent(ours.exact)}",
                    f"{theirs.loss:.2f} / {ours.loss:.2f}",
                ]
            )
    counts = sorted({row.count for row in measured.student.recall if row.task in tasks})
    page.table(
        ["task", "context", "layers in attention", "right choice", "written exactly", "loss of the answer"],
        rows,
        caption=f"Teacher / student, {_range(counts)} questions a row, so a share is known to about "
        f"{_known_to(counts[0])} percentage points either way. Layers in attention: of the student's, where it reads "
        "the question. Written exactly: by greedy decoding. Loss in nats per token.",
    )


def _add_speed(page: Page, measured: StudentMeasurements) -> None:
    models = {TEACHER: measured.teacher.speed, STUDENT: measured.student.speed}
    if not all(models.values()):
        return
    colours = _colours(measured)
    page.section("Speed and memory")
    page.figure(
        figures.cache_figure(
            {name: [(row.length, row.cache_bytes) for row in rows] for name, rows in models.items()}, colours=colours
        ),
        "What one sequence keeps in memory while text is written: keys and values grow with the context, states do "
        "not.",
    )
    page.figure(
        figures.throughput_figure(
            {name: [(row.length, row.decode_tokens_per_second) for row in rows] for name, rows in models.items()},
            colours=colours,
            what="writing",
        ),
        "Writing one token at a time after a context of this length. The teacher runs in its own class of "
        "transformers.",
    )
    page.figure(
        figures.throughput_figure(
            {name: [(row.length, row.prefill_tokens_per_second) for row in rows] for name, rows in models.items()},
            colours=colours,
            what="reading",
        ),
        "Reading a prompt of this length at once.",
    )


def _at_longest(measured: StudentMeasurements) -> tuple[SpeedRow, SpeedRow] | None:
    """Teacher's and student's row at the longest context at which both were timed."""
    theirs, ours = ({row.length: row for row in model.speed} for model in (measured.teacher, measured.student))
    common = theirs.keys() & ours.keys()
    return (theirs[max(common)], ours[max(common)]) if common else None


def _pooled(rows: Sequence[RecallRow]) -> RecallRow | None:
    count = sum(row.count for row in rows)
    if not count:
        return None
    exact, chosen, loss, chance = (
        sum(getattr(row, name) * row.count for row in rows) / count for name in ("exact", "chosen", "loss", "chance")
    )
    return RecallRow(
        task=rows[0].task,
        length=max(row.length for row in rows),
        depth=None,
        count=count,
        exact=exact,
        chosen=chosen,
        loss=loss,
        chance=chance,
    )


def _by_depth(rows: Sequence[RecallRow], task: str) -> list[tuple[float, float]]:
    """(depth, share chosen) over all lengths."""
    depths = sorted({row.depth for row in rows if row.task == task and row.depth is not None})
    pooled = [(depth, _pooled([row for row in rows if (row.task, row.depth) == (task, depth)])) for depth in depths]
    return [(depth, row.chosen) for depth, row in pooled if row is not None]


def _fewest(rows: Sequence[RecallRow]) -> int:
    """Of the counts of a task's depths, over all lengths, the smallest."""
    counts: dict[tuple[str, float | None], int] = {}
    for row in rows:
        counts[row.task, row.depth] = counts.get((row.task, row.depth), 0) + row.count
    return min(counts.values())


def _known_to(count: int) -> str:
    """Percentage points to which a share of `count` answers is known, where it is near a half."""
    return f"{100 * SIGMAS * sqrt(0.25 / count):.0f}"


def _change(theirs: RecallRow, ours: RecallRow, measure: str) -> int:
    """Whether a share of right answers fell (-1), rose (1), or moved no more than two draws of it would differ (0)."""
    shares = [(getattr(row, measure), row.count) for row in (theirs, ours)]
    noise = SIGMAS * sqrt(sum(_variance(share, count) for share, count in shares))
    gap = shares[1][0] - shares[0][0]
    return 0 if abs(gap) <= noise else 1 if gap > 0 else -1


def _variance(share: float, count: int) -> float:
    """Of a share of `count` answers; where all or none are right, as if half an answer were not."""
    share = min(max(share, 0.5 / count), 1 - 0.5 / count)
    return share * (1 - share) / count


def _above_chance(row: RecallRow) -> bool:
    bound = row.chance + SIGMAS * sqrt(row.chance * (1 - row.chance) / row.count)
    return max(row.chosen, row.exact) > bound


def _colours(measured: StudentMeasurements) -> dict[str, str]:
    return figures.model_colours(
        {TEACHER: measured.teacher.trans_points or (None,), STUDENT: measured.own.trans_points}
    )


def _row(name: str, theirs: float, ours: float, words: Any) -> list[str]:
    ratio = f"{ours / theirs:.2f}" if theirs and isfinite(theirs) and isfinite(ours) else ""
    return [name, words(theirs), words(ours), ratio]


def _perplexity(model: MeasuredModel) -> str:
    return _two_digits(model.perplexity)


def _two_digits(value: float) -> str:
    if not isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.3f}" if isfinite(value) else "not finite"


def as_times(ratio: float) -> str:
    if not isfinite(ratio):
        return "not finite"
    return f"{ratio:.2f} times" if ratio < 100 else f"{ratio:,.0f} times"


def as_percent(share: float) -> str:
    if not isfinite(share):
        return "not finite"
    return f"{100 * share:.0f} %" if share == 0 or 0.095 <= share < 0.985 or share >= 0.9995 else f"{100 * share:.1f} %"


def _range(values: Sequence[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def _short(schedule: TransPointSchedule) -> str:
    """The entries with commas; runs of equal ones are counted."""
    words: list[list[Any]] = []
    for entry in schedule:
        word = "none" if entry is None else str(entry)
        if words and words[-1][0] == word:
            words[-1][1] += 1
        else:
            words.append([word, 1])
    return ", ".join(word if count == 1 else f"{word} (x{count})" for word, count in words)


def _name(path: str) -> str:
    return Path(path).name or path


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return value


def measurements_from_json(content: dict[str, Any]) -> StudentMeasurements:
    return StudentMeasurements(
        seq_len=content["seq_len"],
        num_tokens=content["num_tokens"],
        teacher=_model_from_json(content["teacher"]),
        student=_model_from_json(content["student"]),
        schedules=tuple(
            MeasuredSchedule(**_with_nan(row) | {"trans_points": TransPointSchedule(row["trans_points"])})
            for row in content["schedules"]
        ),
        agreement=tuple(AgreementRow(**_with_nan(row)) for row in content["agreement"]),
    )


def _model_from_json(content: dict[str, Any]) -> MeasuredModel:
    points = content["trans_points"]
    return MeasuredModel(
        **content
        | {
            "trans_points": None if points is None else TransPointSchedule(points),
            "nats_per_token": nan if content["nats_per_token"] is None else content["nats_per_token"],
            "bits_per_byte": nan if content["bits_per_byte"] is None else content["bits_per_byte"],
            "loss_by_position": tuple((x, nan if y is None else y) for x, y in content["loss_by_position"]),
            "recall": tuple(RecallRow(**_with_nan(row, but="depth")) for row in content["recall"]),
            "recall_by_depth": tuple(RecallRow(**_with_nan(row, but="depth")) for row in content["recall_by_depth"]),
            "speed": tuple(SpeedRow(**_with_nan(row, but="peak_bytes")) for row in content["speed"]),
        }
    )


def _with_nan(row: dict[str, Any], *, but: str = "trans_points") -> dict[str, Any]:
    """A row in which every null, but that of a field that may be absent, was a number that was not finite."""
    return {name: nan if value is None and name != but else value for name, value in row.items()}
