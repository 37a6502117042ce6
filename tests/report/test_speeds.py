"""The bars of a benchmark: as many as numbers, as long as they say, in one colour for each name."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from transmamba.errors import InputError
from transmamba.report.speeds import speed_figure

VALUES = {"small, 2 heads": {"ours": 2.0, "theirs": 3.5}, "large, 4 heads": {"ours": 8.0}}


def bars_of(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and patch.get_width() > 0]


def test_every_number_has_its_bar_and_every_name_its_colour(tmp_path: Path) -> None:
    figure = speed_figure(VALUES, title="Time", unit="ms")
    bars = bars_of(figure)
    assert [bar.get_width() for bar in bars] == [2.0, 3.5, 8.0]
    colours = [bar.get_facecolor() for bar in bars]
    assert colours[0] == colours[2] != colours[1]
    assert {text.get_text().strip() for text in figure.axes[0].texts} == {"2", "3.5", "8"}
    figure.savefig(tmp_path / "speeds.svg")
    assert (tmp_path / "speeds.svg").stat().st_size > 1000


def test_nothing_to_draw_is_an_error() -> None:
    with pytest.raises(InputError, match="no number"):
        speed_figure({"a": {}}, title="", unit="ms")
