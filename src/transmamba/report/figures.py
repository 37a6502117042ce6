"""The figures of a report, as matplotlib Figures that belong to nobody: no pyplot, no global state.

Lines are given as {model name: [(x, y), ...]}. A model has one colour in every figure of a report: `model_colours`
chooses it. Colours are close to Okabe and Ito's, which colour-blind readers can tell apart; markers differ too.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, TypeVar

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from transmamba.errors import InputError
from transmamba.schedule import TransPointSchedule

T = TypeVar("T")
Points = Sequence[tuple[float, float]]

ATTENTION_COLOUR = "#0072B2"
SSM_COLOUR = "#F0B23C"
TRANSFORMER_COLOUR = "#0072B2"
MAMBA2_COLOUR = "#E08E00"
LAYER_HYBRID_COLOUR = "#009E73"
TRANSMAMBA_COLOUR = "#B8317F"
OTHER_COLOURS = ("#56B4E9", "#6B6B6B", "#D55E00", "#8C6D1F", "#4B3F72", "#A3A500")

MARKERS = "osD^vPX*"
WIDTH = 5.9  # inches; a page shows figures about 700 pixels wide, a phone half of that
MOST_CURVE_POINTS = 80

STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#222222",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


def model_colours(schedules: Mapping[str, Sequence[int | None]]) -> dict[str, str]:
    """A colour for each model, by the kind of its schedule; further models of a kind get colours of their own."""
    others = iter(OTHER_COLOURS)
    colours: dict[str, str] = {}
    for name, entries in schedules.items():
        preferred = _colour_of_kind(entries)
        colours[name] = next(others, "#000000") if preferred in colours.values() else preferred
    return colours


def schedule_figure(schedule: TransPointSchedule, seq_len: int, *, title: str | None = None) -> Figure:
    """Layers by positions: where each layer is attention and where SSM, in a document of `seq_len` tokens.

    Every stretch between two TransPoints is drawn equally wide, so that early switches stay visible.
    """
    with rc_context(STYLE):
        height = 1.6 + min(max(len(schedule) * 0.24, 1.2), 8.5)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        _draw_schedule(axes, schedule, seq_len)
        axes.set_xlabel("position in the document (tokens; not to scale)")
        axes.set_ylabel("layer, from the input down")
        if title:
            axes.set_title(title, pad=8)
        figure.legend(handles=_mode_patches(), loc="outside lower center", ncols=2)
    return figure


def loss_curves(
    curves: Mapping[str, Points],
    *,
    colours: Mapping[str, str],
    what: str = "training loss",
    unit: str = "nats per token",
    x_label: str = "tokens read",
) -> Figure:
    """Training loss, or what else falls in training, against tokens, a line per model.

    Long curves are thinned to the means of neighbouring points, and the steep beginning is cut off at the top so that
    the differences at the end can be seen.
    """
    thinned = {name: _means(points, MOST_CURVE_POINTS) for name, points in curves.items()}
    with rc_context(STYLE):
        figure, axes = _line_figure(thinned, colours, markers=False)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.set_xlabel(x_label)
        axes.set_ylabel(f"{what} ({unit})")
        top = _loss_after_beginning(thinned.values())
        if top is not None:
            axes.set_ylim(top=top)
            place = axes.transAxes
            axes.text(0.99, 0.98, "the beginning is cut off", transform=place, ha="right", va="top", color="#666666")
        axes.set_xlim(left=0)
    return figure


def loss_by_position(
    curves: Mapping[str, Points],
    *,
    colours: Mapping[str, str],
    trans_points: Iterable[int | None] = (),
    unit: str = "nats per token",
) -> Figure:
    """Validation loss against the position in the document, a line per model; TransPoints are dotted verticals."""
    return position_figure(curves, colours=colours, trans_points=trans_points, what=f"validation loss ({unit})")


def position_figure(
    curves: Mapping[str, Points],
    *,
    colours: Mapping[str, str],
    what: str,
    trans_points: Iterable[int | None] = (),
    bottom: float | None = None,
    is_share: bool = False,
) -> Figure:
    """Any measure against the position in the document, drawn as in `loss_by_position`.

    bottom: of its axis. is_share: write it in percent.
    """
    with rc_context(STYLE):
        figure, axes = _line_figure(curves, colours)
        positions = [x for points in curves.values() for x, _ in points]
        first, last = (min(positions), max(positions)) if positions else (1, 1)
        # Only symlog can show position 0; without it, log does not waste a tenth of the width.
        if first < 1:
            axes.set_xscale("symlog", base=2, linthresh=1)
        else:
            axes.set_xscale("log", base=2)
        axes.grid(visible=False, axis="x")
        marks = sorted({entry for entry in trans_points if entry is not None and first <= entry <= last and entry > 0})
        for mark in marks:
            axes.axvline(mark, color="#888888", linewidth=1.1, linestyle=":", zorder=0)
        if marks:
            top = axes.get_xaxis_transform()
            axes.text(marks[0], 1.01, "TransPoints", transform=top, ha="left", va="bottom", fontsize=9, color="#666666")
        powers = [2**exponent for exponent in range(int(last).bit_length()) if 2**exponent >= first]
        axes.xaxis.set_major_locator(FixedLocator([0, *powers] if first < 1 else powers))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.tick_params(axis="x", labelrotation=45 if len(powers) > 11 else 0)
        axes.set_xlim(0 if first < 1 else first / 1.12, last * 1.12)
        axes.set_xlabel("position in the document (tokens)")
        axes.set_ylabel(what)
        if bottom is not None:
            axes.set_ylim(bottom=bottom)
        if is_share:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def quality_by_schedule(
    curves: Mapping[str, Points], *, colours: Mapping[str, str], level: tuple[str, float], what: str
) -> Figure:
    """A measure against the share of attention in a schedule, a line per model; level: another's name and its value,
    drawn across.
    """
    with rc_context(STYLE):
        name, value = level
        figure, axes = _line_figure(curves, colours, across=level)
        axes.axhline(value, color=colours[name], linewidth=1.5, linestyle="--", zorder=1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("token mixing that attention does (the rest is state space)")
        axes.set_ylabel(what)
    return figure


def recall_figure(
    panels: Mapping[str, Mapping[str, Points]],
    *,
    colours: Mapping[str, str],
    chance: Mapping[str, float],
    x_label: str,
    is_length: bool,
) -> Figure:
    """Shares of right answers, a panel per task and in it a line per model; guessing is the dotted level.

    is_length: whether x is a length in tokens, or a share of the context.
    """
    if not panels:
        raise InputError("There is no recall to draw; give at least one task.")
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
        order = list(colours)
        everything = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (task, curves) in zip(everything, panels.items(), strict=True):
            for name, points in curves.items():
                axes.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    label=name,
                    color=colours[name],
                    marker=MARKERS[order.index(name) % len(MARKERS)],
                )
            axes.axhline(chance[task], color="#888888", linewidth=1.1, linestyle=":", label="guessing")
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_title(task)
            if is_length:
                _length_axis(axes, curves)
            else:
                axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_xlabel(x_label)
        everything[0].set_ylabel("right choices")
        handles, labels = everything[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9.5, handlelength=1.3)
    return figure


def throughput_figure(curves: Mapping[str, Points], *, colours: Mapping[str, str], what: str) -> Figure:
    """Tokens per second against the length of the context, a line per model; `what` was done, such as "decoding"."""
    with rc_context(STYLE):
        figure, axes = _line_figure(curves, colours)
        _length_axis(axes, curves)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter())
        axes.set_ylabel(f"{what} (tokens per second)")
    return figure


def cache_figure(curves: Mapping[str, Points], *, colours: Mapping[str, str]) -> Figure:
    """Bytes of the cache of one sequence against the length of the context, on logarithmic axes, a line per model."""
    with rc_context(STYLE):
        figure, axes = _line_figure(curves, colours)
        _length_axis(axes, curves)
        axes.set_yscale("log", nonpositive="mask")
        sizes = [size for points in curves.values() for _, size in points if size > 0]
        if sizes and max(sizes) < 300 * min(sizes):
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("cache of one sequence")
    return figure


def _colour_of_kind(entries: Sequence[int | None]) -> str:
    kinds = set(entries)
    if kinds == {None}:
        return TRANSFORMER_COLOUR
    if kinds == {0}:
        return MAMBA2_COLOUR
    if kinds == {0, None}:
        return LAYER_HYBRID_COLOUR
    return TRANSMAMBA_COLOUR


def _mode_patches() -> list[Patch]:
    return [Patch(color=ATTENTION_COLOUR, label="attention"), Patch(color=SSM_COLOUR, label="SSM")]


def _draw_schedule(axes: Axes, schedule: TransPointSchedule, seq_len: int) -> None:
    segments = schedule.segments(seq_len)
    edges = [0, *(end for _, end in segments)]
    place = {position: index for index, position in enumerate(edges)}
    for layer, entry in enumerate(schedule):
        switch = place[seq_len if entry is None else min(entry, seq_len)]
        axes.broken_barh([(0, switch)], (layer - 0.42, 0.84), facecolor=ATTENTION_COLOUR)
        axes.broken_barh([(switch, len(segments) - switch)], (layer - 0.42, 0.84), facecolor=SSM_COLOUR)
    axes.set_xlim(0, len(segments))
    axes.set_ylim(len(schedule) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    ticks = _spread(list(enumerate(edges)), 16)
    axes.set_xticks(
        [index for index, _ in ticks], [str(edge) for _, edge in ticks], rotation=45 if len(ticks) > 8 else 0
    )
    roomy = len(schedule) <= 34
    every = 1 if roomy else max(1, -(-len(schedule) // 8))
    layers = range(0, len(schedule), every)
    axes.set_yticks(layers, [str(layer) for layer in layers])
    if roomy:
        labels = axes.secondary_yaxis("right")
        labels.set_yticks(layers, ["never" if schedule[layer] is None else str(schedule[layer]) for layer in layers])
        labels.tick_params(length=0)
        labels.spines[:].set_visible(False)
        labels.set_ylabel("TransPoint")


def _line_figure(
    curves: Mapping[str, Points],
    colours: Mapping[str, str],
    *,
    markers: bool = True,
    across: tuple[str, float] | None = None,
) -> tuple[Figure, Axes]:
    """Lines with their legend; across: a name and a level that the caller will draw, for the legend."""
    if not curves:
        raise InputError("There is no curve to draw; give at least one model.")
    unknown = [name for name in [*curves, *([across[0]] if across else [])] if name not in colours]
    if unknown:
        raise InputError(
            f"No colour for {', '.join(unknown)}; colours come from model_colours, for all models of the report."
        )
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    axes = figure.add_subplot()
    order = list(colours)
    for name, points in curves.items():
        finite = [(x, y) for x, y in points if isfinite(x) and isfinite(y)]
        axes.plot(
            [x for x, _ in finite],
            [y for _, y in finite],
            label=name,
            color=colours[name],
            marker=MARKERS[order.index(name) % len(MARKERS)] if markers else None,
        )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    handles, labels = axes.get_legend_handles_labels()
    if across is not None:
        handles.append(Line2D([], [], color=colours[across[0]], linestyle="--"))
        labels.append(across[0])
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=min(len(labels), 4),
        fontsize=9.5,
        columnspacing=1.1,
        handlelength=1.3,
    )
    return figure, axes


def _length_axis(axes: Axes, curves: Mapping[str, Points]) -> None:
    lengths = sorted({x for points in curves.values() for x, _ in points if x > 0})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_spread(lengths, 9)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("length of the context (tokens)")


def _spread(values: list[T], most: int) -> list[T]:
    """At most `most` of the values, evenly chosen, the last always among them."""
    every = max(1, -(-len(values) // most))
    return values[::-1][::every][::-1]


def _means(points: Points, most: int) -> list[tuple[float, float]]:
    size = max(1, -(-len(points) // most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _loss_after_beginning(curves: Iterable[Points]) -> float | None:
    """The largest loss past the first tenth of training, with some air; None if that cuts nothing worth cutting."""
    early: list[float] = []
    late: list[float] = []
    for points in curves:
        end = max((x for x, _ in points), default=0)
        for x, y in points:
            if isfinite(y):
                (late if x >= end / 10 else early).append(y)
    if not late or not early:
        return None
    top = max(late) + 0.15 * (max(late) - min(late))
    return top if max(early) > top > min(late) else None
