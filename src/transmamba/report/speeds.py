"""The figure of a benchmark: bars side by side, a group for each thing that was measured."""

from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.figure import Figure

from transmamba.errors import InputError

from .figures import ATTENTION_COLOUR, OTHER_COLOURS, STYLE, TRANSMAMBA_COLOUR, WIDTH

BAR = 0.26  # inches


def speed_figure(values: Mapping[str, Mapping[str, float]], *, title: str, unit: str) -> Figure:
    """Horizontal bars, {group: {name: value}}; a name has one colour in all groups, and each bar bears its number.

    Raises:
        InputError: there is nothing to draw.
    """
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    if not names:
        raise InputError("values holds no number; give at least one.")
    colours = dict(zip(names, (TRANSMAMBA_COLOUR, ATTENTION_COLOUR, *OTHER_COLOURS) * len(names), strict=False))
    with rc_context(STYLE):
        bars = sum(len(group) for group in values.values())
        figure = Figure(figsize=(WIDTH, 1.3 + BAR * (bars + len(values))), layout="constrained")
        axes = figure.add_subplot()
        place = 0.0
        ticks: list[float] = []
        for group in values.values():
            ticks.append(place + (len(group) - 1) / 2)
            for name, value in group.items():
                axes.barh(place, value, color=colours[name], height=0.8)
                axes.text(value, place, f" {value:,.4g}", va="center", fontsize=8.5, color="#333333")
                place += 1
            place += 1
        axes.set_yticks(ticks, [label.replace(", ", ",\n") for label in values])
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_xlim(left=0)
        axes.set_xlabel(unit)
        axes.grid(visible=False, axis="y")
        axes.set_title(title)
        handles = [axes.barh(0, 0, color=colours[name]) for name in names]
        figure.legend(handles=handles, labels=names, loc="outside lower center", ncols=min(3, len(names)))
    return figure
