"""Figures show what they are given: the right number of lines, in the right places, in the colours of their models."""

from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from transmamba.errors import InputError
from transmamba.report import (
    cache_figure,
    loss_by_position,
    loss_curves,
    model_colours,
    position_figure,
    quality_by_schedule,
    recall_figure,
    schedule_figure,
    throughput_figure,
)
from transmamba.report.figures import ATTENTION_COLOUR, SSM_COLOUR
from transmamba.schedule import TransPointSchedule

SCHEDULES = {"a": [None, None], "b": [0, 0], "c": [0, None], "d": [0, 7]}
COLOURS = model_colours(SCHEDULES)
CURVES = {
    name: [(64.0, 10.0 + shift), (128.0, 20.0 + shift), (256.0, 40.0 + shift)] for shift, name in enumerate(SCHEDULES)
}


def widths_by_colour(figure: Figure, layer: int) -> dict[str, float]:
    """How wide each mode's bar is in a layer, as a share of the axis."""
    axes = figure.axes[0]
    left, right = axes.get_xlim()
    widths = dict.fromkeys((ATTENTION_COLOUR, SSM_COLOUR), 0.0)
    for bars in axes.collections[2 * layer : 2 * layer + 2]:
        box = bars.get_paths()[0].get_extents()
        assert box.y0 < layer < box.y1
        widths[to_hex(bars.get_facecolor()[0]).upper()] += box.width / (right - left)
    return widths


def test_each_kind_of_schedule_has_a_colour_of_its_own() -> None:
    assert len(set(COLOURS.values())) == 4


def test_models_of_one_kind_get_different_colours() -> None:
    many = {str(index): [0, index + 1] for index in range(6)}
    assert len(set(model_colours(many).values())) == 6


def test_a_colour_does_not_depend_on_the_other_models() -> None:
    assert model_colours({"d": [0, 7]})["d"] == COLOURS["d"]


def test_a_schedule_shows_each_layers_share_of_segments() -> None:
    schedule = TransPointSchedule([0, 4, 64, 256, None, 1000])
    figure = schedule_figure(schedule, 256)
    # Three segments: [0, 4), [4, 64), [64, 256).
    shares = [widths_by_colour(figure, layer)[ATTENTION_COLOUR] for layer in range(6)]
    assert shares == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])
    for layer, share in enumerate(shares):
        assert widths_by_colour(figure, layer)[SSM_COLOUR] == pytest.approx(1 - share)


def test_a_schedule_is_labelled_with_positions_and_trans_points() -> None:
    figure = schedule_figure(TransPointSchedule([0, 4, None]), 256, title="a title")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "4", "256"]
    right = axes.child_axes[0]
    assert [label.get_text() for label in right.get_yticklabels()] == ["0", "4", "never"]
    assert axes.get_title(loc="left") == "a title"


def test_v9_ticks_are_evenly_spaced() -> None:
    figure = schedule_figure(TransPointSchedule.named("v9", 24), 8192)
    ticks = figure.axes[0].get_xticks()
    assert {after - before for before, after in pairwise(ticks)} == {1}


def test_many_trans_points_do_not_crowd_the_axis() -> None:
    figure = schedule_figure(TransPointSchedule(range(0, 640, 10)), 1000)
    assert len(figure.axes[0].get_xticks()) <= 16


@pytest.mark.parametrize(
    "figure",
    [
        loss_curves(CURVES, colours=COLOURS),
        loss_by_position(CURVES, colours=COLOURS),
        throughput_figure(CURVES, colours=COLOURS, what="decoding"),
        cache_figure(CURVES, colours=COLOURS),
        position_figure(CURVES, colours=COLOURS, what="KL"),
    ],
    ids=["loss", "position", "throughput", "cache", "any position"],
)
def test_every_model_has_a_line_in_its_colour_with_its_numbers(figure: Figure) -> None:
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == list(CURVES)
    for line, (name, points) in zip(lines, CURVES.items(), strict=True):
        assert line.get_color() == COLOURS[name]
        assert list(zip(*line.get_data(), strict=True)) == points
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(CURVES)


def test_trans_points_within_the_positions_are_marked() -> None:
    figure = loss_by_position(CURVES, colours=COLOURS, trans_points=[0, 16, 64, 100, 100, 256, 300, None])
    marks = [line.get_xdata()[0] for line in figure.axes[0].get_lines()[len(CURVES) :]]
    assert marks == [64, 100, 256]


def test_position_zero_is_drawn() -> None:
    figure = loss_by_position({"a": [(0.0, 3.0), (1.0, 2.0), (64.0, 1.0)]}, colours=COLOURS)
    axes = figure.axes[0]
    assert axes.get_xlim()[0] <= 0
    assert axes.get_lines()[0].get_xdata()[0] == 0


def test_cache_axes_are_logarithmic() -> None:
    axes = cache_figure(CURVES, colours=COLOURS).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_throughput_begins_at_zero() -> None:
    assert throughput_figure(CURVES, colours=COLOURS, what="prefill").axes[0].get_ylim()[0] == 0


def test_long_curves_are_averaged_and_keep_their_mean() -> None:
    points = [(float(step), 3.0 + step % 2) for step in range(1, 1601)]
    figure = loss_curves({"a": points}, colours=COLOURS)
    drawn = figure.axes[0].get_lines()[0].get_ydata()
    assert len(drawn) == 80
    assert list(drawn) == [3.5] * 80


def test_the_beginning_is_cut_off_and_said_so_only_when_it_is_steep() -> None:
    steep = [(float(step), 1.0 + 9.0 / step) for step in range(1, 61)]
    axes = loss_curves({"a": steep}, colours=COLOURS).axes[0]
    assert 1.15 < axes.get_ylim()[1] < 4
    assert [text.get_text() for text in axes.texts] == ["the beginning is cut off"]
    flat = [(float(step), 2.0 + step % 2) for step in range(1, 61)]
    axes = loss_curves({"a": flat}, colours=COLOURS).axes[0]
    assert axes.get_ylim()[1] > 3
    assert not axes.texts


def test_numbers_that_are_not_finite_are_left_out() -> None:
    curves = {"a": [(1.0, float("nan")), (2.0, 5.0), (3.0, float("inf"))]}
    for figure in (loss_curves(curves, colours=COLOURS), cache_figure(curves, colours=COLOURS)):
        assert list(figure.axes[0].get_lines()[0].get_xdata()) == [2.0]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_figures_are_written_without_a_display(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"figure.{suffix}"
    cache_figure(CURVES, colours=COLOURS).savefig(path)
    assert path.stat().st_size > 1000


def test_global_settings_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    schedule_figure(TransPointSchedule([0, 4]), 256)
    loss_curves(CURVES, colours=COLOURS)
    assert dict(matplotlib.rcParams) == before


def test_a_model_without_a_colour_is_named() -> None:
    with pytest.raises(InputError, match="No colour for stranger"):
        cache_figure({"stranger": [(1.0, 1.0)]}, colours=COLOURS)


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(InputError, match="no curve"):
        cache_figure({}, colours=COLOURS)


def test_a_schedules_quality_is_drawn_against_its_teachers() -> None:
    points = [(0.25, 30.0), (1.0, 20.0)]
    figure = quality_by_schedule({"d": points}, colours=COLOURS, level=("a", 19.5), what="perplexity")
    line, level = figure.axes[0].get_lines()
    assert list(zip(*line.get_data(), strict=True)) == points
    assert set(level.get_ydata()) == {19.5}
    assert (line.get_color(), level.get_color()) == (COLOURS["d"], COLOURS["a"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["d", "a"]


def test_recall_has_a_panel_for_each_task_and_the_level_of_guessing() -> None:
    panels = {task: {"a": [(64, 0.5), (128, share)], "d": [(64, 0.25), (128, 0.2)]} for task, share in PANELS.items()}
    figure = recall_figure(panels, colours=COLOURS, chance=CHANCE, x_label="context", is_length=True)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(PANELS)
    for axes, (task, curves) in zip(figure.axes, panels.items(), strict=True):
        *lines, level = axes.get_lines()
        assert [list(zip(*line.get_data(), strict=True)) for line in lines] == list(curves.values())
        assert set(level.get_ydata()) == {CHANCE[task]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "d", "guessing"]


PANELS = {"needle": 0.75, "phone-book": 1.0}
CHANCE = {"needle": 0.25, "phone-book": 0.125}


def test_no_recall_is_an_error() -> None:
    with pytest.raises(InputError, match="no recall to draw"):
        recall_figure({}, colours=COLOURS, chance={}, x_label="", is_length=False)
