"""The report of a quickstart: one TransMamba and its baselines, trained alike, compared in words, a table and figures.

`QuickstartReport` holds the measurements and nothing else; it is written as JSON, as an HTML page and as a table in the
terminal. Every sentence is made from the numbers and holds for any numbers, whoever wins.
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
from transmamba.report.units import format_bytes, format_count, format_seconds
from transmamba.schedule import TransPointSchedule

if TYPE_CHECKING:
    from rich.console import Console

MIXER_FORMS = ("shared", "standard")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRun:
    """One model of the comparison and everything measured on it. Losses that are not finite are kept, and said so."""

    name: str
    trans_points: TransPointSchedule
    mixer_form: str
    num_parameters: int
    training_curve: tuple[tuple[int, float, float], ...]  # (tokens read, seconds, nats per token)
    bits_per_byte: float  # on the validation documents
    nats_per_token: float
    loss_by_position: tuple[tuple[float, float], ...]  # (position in the document, nats per token)
    prefill: tuple[tuple[int, float], ...]  # (tokens of the prompt, tokens per second)
    decode: tuple[tuple[int, float], ...]  # (tokens of context, tokens per second)
    cache: tuple[tuple[int, int], ...]  # (tokens of context, bytes of one sequence)

    def __post_init__(self) -> None:
        if self.mixer_form not in MIXER_FORMS:
            raise InputError(f"mixer_form={self.mixer_form!r} must be one of {', '.join(MIXER_FORMS)}.")
        object.__setattr__(self, "trans_points", TransPointSchedule(self.trans_points))
        for name, width in (
            ("training_curve", 3),
            ("loss_by_position", 2),
            ("prefill", 2),
            ("decode", 2),
            ("cache", 2),
        ):
            rows = tuple(tuple(row) for row in getattr(self, name))
            for row in rows:
                if len(row) != width:
                    raise InputError(f"{name} of {self.name!r} has the row {row}; rows have {width} numbers.")
            object.__setattr__(self, name, rows)

    @property
    def tokens(self) -> int:
        """Tokens read in training."""
        return self.training_curve[-1][0] if self.training_curve else 0

    @property
    def seconds(self) -> float:
        """Seconds spent in training."""
        return self.training_curve[-1][1] if self.training_curve else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossedSample:
    """Text that a model wrote past its TransPoints.

    Each piece is (position of its first token, text); the first begins where the prompt ends. A TransPoint is marked
    before the first piece that begins at or after it, so pieces should begin at the TransPoints, or be single tokens.
    """

    model: str
    prompt: str
    pieces: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        pieces = tuple((position, text) for position, text in self.pieces)
        if not pieces:
            raise InputError(f"The sample of {self.model!r} has no pieces; give at least the first generated token.")
        positions = [position for position, _ in pieces]
        if positions[0] < 0 or sorted(set(positions)) != positions:
            raise InputError(
                f"Positions of the pieces must be >= 0 and increase; those of {self.model!r} are {positions}."
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
    """Measurements of a quickstart. `subject` names the run that the report is about; the others are its baselines."""

    subject: str
    runs: tuple[ModelRun, ...]
    samples: tuple[CrossedSample, ...]
    seq_len: int
    corpus: str
    tokenizer: str
    versions: Mapping[str, str]
    seed: int
    command: str
    date: str
    seconds: float  # of the whole quickstart

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(self.runs))
        object.__setattr__(self, "samples", tuple(self.samples))
        object.__setattr__(self, "versions", dict(self.versions))
        names = [run.name for run in self.runs]
        if len(set(names)) != len(names):
            raise InputError(f"Runs need names of their own; these are {', '.join(names)}.")
        for role, name in [
            ("subject", self.subject),
            *(("model of a sample", sample.model) for sample in self.samples),
        ]:
            if name not in names:
                raise InputError(f"The {role} is {name!r}, which is no run; runs are {', '.join(names) or 'none'}.")

    @property
    def subject_run(self) -> ModelRun:
        return next(run for run in self.runs if run.name == self.subject)

    @property
    def baselines(self) -> tuple[ModelRun, ...]:
        return tuple(run for run in self.runs if run.name != self.subject)

    def findings(self) -> list[str]:
        """What the numbers say, in whole sentences: quality, then memory, then speed."""
        return [*_quality_findings(self), *_cache_findings(self), *_decode_findings(self)]

    def to_json(self) -> str:
        """Text that `from_json` reads; a number that is not finite is written as null."""
        return json.dumps(_without_nan(asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The report that `to_json` wrote."""
        try:
            content = json.loads(text)
            runs = tuple(_run_from_json(run) for run in content.pop("runs"))
            samples = tuple(CrossedSample(**sample) for sample in content.pop("samples"))
            return cls(runs=runs, samples=samples, **content)
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
        for sentence in self.findings():
            page.finding(sentence)
        headers, rows = _summary(self)
        page.table(headers, rows, strong_rows=[self.runs.index(self.subject_run)], caption=_summary_caption(self))
        _add_schedules(page, self)
        _add_learning(page, self)
        _add_memory_and_speed(page, self)
        _add_samples(page, self)
        _add_details(page, self)
        return page

    def print_table(self, console: "Console") -> None:
        """Print the summary and the findings on a rich console."""
        from rich.markup import escape
        from rich.table import Table

        headers, rows = _summary(self)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column, header in enumerate(headers):
            table.add_column(header, justify="right" if column else "left", no_wrap=column == 0)
        for run, row in zip(self.runs, rows, strict=True):
            table.add_row(*map(escape, row), style="bold" if run.name == self.subject else "")
        console.print(table)
        console.print()
        for sentence in self.findings():
            console.print(sentence, markup=False, highlight=False)


def _quality_findings(report: QuickstartReport) -> list[str]:
    sentences = []
    finite = [run for run in report.runs if isfinite(run.bits_per_byte)]
    if finite:
        least = min(run.bits_per_byte for run in finite)
        best = [run.name for run in finite if f"{run.bits_per_byte:.3f}" == f"{least:.3f}"]
        verb = "reaches" if len(best) == 1 else "reach"
        sentences.append(
            f"After {_tokens_text(report)}, {_and(best)} {verb} the lowest validation loss: {least:.3f} bits per byte."
            if len(report.runs) > 1
            else f"After {_tokens_text(report)}, {best[0]} reaches a validation loss of {least:.3f} bits per byte."
        )
    sentences += [
        f"{run.name} has no finite validation loss: its training diverged." for run in report.runs if run not in finite
    ]
    subject = report.subject_run
    rivals = [run for run in finite if run is not subject]
    if subject in finite and rivals:
        rival = min(rivals, key=lambda run: run.bits_per_byte)
        percent = 100 * (subject.bits_per_byte / rival.bits_per_byte - 1)
        distance = "equal to" if abs(percent) < 0.05 else f"{abs(percent):.1f} % {'below' if percent < 0 else 'above'}"
        sentences.append(
            f"The loss of {subject.name} is {distance} that of the best baseline, {rival.name} "
            f"({subject.bits_per_byte:.3f} against {rival.bits_per_byte:.3f}; lower is better)."
        )
    return sentences


def _cache_findings(report: QuickstartReport) -> list[str]:
    pair = _at_longest(report, "cache")
    if pair is None:
        return []
    length, rival, ours, theirs = pair
    if theirs <= 0:
        return []
    share = ours / theirs
    if format_bytes(ours) == format_bytes(theirs):
        words = f"as much as that of {rival.name}"
    elif share < 1:
        words = f"{_percent(share)} of what {rival.name} needs ({format_bytes(theirs)})"
    else:
        words = f"{share:.2f} times what {rival.name} needs ({format_bytes(theirs)})"
    return [f"At {length:,} tokens of context the cache of {report.subject} takes {format_bytes(ours)}, {words}."]


def _decode_findings(report: QuickstartReport) -> list[str]:
    pair = _at_longest(report, "decode")
    if pair is None:
        return []
    length, rival, ours, theirs = pair
    if not (isfinite(ours) and isfinite(theirs) and theirs > 0):
        return []
    return [
        f"At {length:,} tokens of context {report.subject} generates {format_count(ours)} tokens per second, "
        f"{ours / theirs:.2f} times as many as {rival.name} ({format_count(theirs)})."
    ]


def _at_longest(report: QuickstartReport, measure: str) -> tuple[int, ModelRun, float, float] | None:
    """The longest context at which the subject and its rival were both measured, the rival, and the two values.

    The rival is the Transformer if there is one, else the first baseline that was measured.
    """
    ours = dict(getattr(report.subject_run, measure))
    baselines = sorted(report.baselines, key=lambda run: set(run.trans_points) != {None})
    for rival in baselines:
        theirs = dict(getattr(rival, measure))
        common = ours.keys() & theirs.keys()
        if common:
            length = max(common)
            return length, rival, ours[length], theirs[length]
    return None


def _summary(report: QuickstartReport) -> tuple[list[str], list[list[str]]]:
    headers = [
        "model",
        "parameters",
        "bits per byte",
        "nats per token",
        "prefill tokens/s",
        "decoding tokens/s",
        "cache",
        "trained in",
    ]
    rows = [
        [
            run.name,
            format_count(run.num_parameters),
            _loss_text(run.bits_per_byte),
            _loss_text(run.nats_per_token),
            format_count(max(run.prefill)[1]) if run.prefill else "",
            format_count(max(run.decode)[1]) if run.decode else "",
            format_bytes(max(run.cache)[1]) if run.cache else "",
            format_seconds(run.seconds),
        ]
        for run in report.runs
    ]
    return headers, rows


def _summary_caption(report: QuickstartReport) -> str:
    lengths: dict[str, list[str]] = {}
    for measure, words in (("prefill", "prefill"), ("decode", "decoding"), ("cache", "cache")):
        longest = [max(getattr(run, measure))[0] for run in report.runs if getattr(run, measure)]
        if longest:
            lengths.setdefault(_range_text(longest), []).append(words)
    parts = [f"{_and(words)} at {length} tokens of context" for length, words in lengths.items()]
    measured = f" {'; '.join(parts).capitalize()}." if parts else ""
    return f"Loss on validation documents, lower is better.{measured}"


def _add_schedules(page: Page, report: QuickstartReport) -> None:
    subject = report.subject_run
    page.section("Where attention ends and the state space begins")
    page.figure(
        figures.schedule_figure(subject.trans_points, report.seq_len, title=subject.name),
        f"Every layer of {subject.name} mixes the tokens before its TransPoint by attention and the later ones by an "
        "SSM, whose state the Memory Converter computes from the keys and values of the earlier ones.",
    )
    if report.baselines:
        page.figure(
            figures.schedules_figure({run.name: run.trans_points for run in report.baselines}, report.seq_len),
            "The baselines, drawn in the same way.",
        )


def _add_learning(page: Page, report: QuickstartReport) -> None:
    colours = _colours(report)
    page.section("Learning")
    page.figure(
        figures.loss_curves(
            {run.name: [(t, loss) for t, _, loss in run.training_curve] for run in report.runs}, colours=colours
        ),
        "Training loss against the tokens read, lower is better; neighbouring steps are averaged where there are many.",
    )
    if any(run.loss_by_position for run in report.runs):
        page.figure(
            figures.loss_by_position(
                {run.name: run.loss_by_position for run in report.runs},
                colours=colours,
                trans_points=report.subject_run.trans_points,
            ),
            "Validation loss by position: the more of the document a model has read, the better it should predict. "
            f"Dotted lines are the TransPoints of {report.subject}.",
        )


def _add_memory_and_speed(page: Page, report: QuickstartReport) -> None:
    colours = _colours(report)
    page.section("Memory and speed")
    if any(run.cache for run in report.runs):
        page.figure(
            figures.cache_figure({run.name: run.cache for run in report.runs}, colours=colours),
            "What one sequence keeps in memory while text is generated: keys and values grow with the context, states "
            "do not.",
        )
    if any(run.decode for run in report.runs):
        page.figure(
            figures.throughput_figure({run.name: run.decode for run in report.runs}, colours=colours, what="decoding"),
            "Generating one token at a time, one sequence, after a context of this length.",
        )
    if any(run.prefill for run in report.runs):
        page.figure(
            figures.throughput_figure({run.name: run.prefill for run in report.runs}, colours=colours, what="prefill"),
            "Reading a prompt of this length at once.",
        )


def _add_samples(page: Page, report: QuickstartReport) -> None:
    if not report.samples:
        return
    page.section("Text")
    schedules = {run.name: run.trans_points for run in report.runs}
    for sample in report.samples:
        schedule = schedules[sample.model]
        crossed = sample.crossed_in_prompt(schedule)
        within = f" TransPoints within the prompt: {', '.join(map(str, crossed))}." if crossed else ""
        page.paragraph(
            f"Written by {sample.model} after the prompt in grey, which ends before token {sample.pieces[0][0]:,}. "
            f"Labels stand where layers switch to the SSM.{within}"
        )
        page.sample(sample.marked(schedule), prompt=sample.prompt)


def _add_details(page: Page, report: QuickstartReport) -> None:
    page.section("How this was made")
    page.code(report.command)
    rows = [
        ["corpus", report.corpus],
        ["tokenizer", report.tokenizer],
        ["sequence length", f"{report.seq_len:,} tokens"],
        ["seed", str(report.seed)],
        ["date", report.date],
        ["total time", format_seconds(report.seconds)],
        *([name, version] for name, version in report.versions.items()),
    ]
    page.table(["", ""], rows, text_columns=2)
    page.table(
        ["model", "form", "TransPoints", "tokens read", "training loss at the end"],
        [
            [
                run.name,
                run.mixer_form,
                str(run.trans_points).replace(",", ", "),
                format_count(run.tokens),
                _loss_text(run.training_curve[-1][2]) if run.training_curve else "",
            ]
            for run in report.runs
        ],
        text_columns=3,
        caption="TransPoints by layer, from the input; none: the layer never switches.",
    )


def _colours(report: QuickstartReport) -> dict[str, str]:
    return figures.model_colours({run.name: run.trans_points for run in report.runs})


def _tokens_text(report: QuickstartReport) -> str:
    counts = [run.tokens for run in report.runs]
    if len(set(counts)) == 1:
        return f"{format_count(counts[0])} tokens" + (" each" if len(counts) > 1 else "")
    return f"{format_count(min(counts))} to {format_count(max(counts))} tokens"


def _range_text(values: list[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def _loss_text(loss: float) -> str:
    return f"{loss:.3f}" if isfinite(loss) else "diverged"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return value


def _run_from_json(content: dict[str, Any]) -> ModelRun:
    """The run, with every null but those of the schedule read as a number that was not finite."""
    fields = dict(content)
    for name in ("bits_per_byte", "nats_per_token"):
        fields[name] = nan if fields[name] is None else fields[name]
    for name in ("training_curve", "loss_by_position", "prefill", "decode", "cache"):
        fields[name] = tuple(tuple(nan if number is None else number for number in row) for row in fields[name])
    return ModelRun(**fields)
