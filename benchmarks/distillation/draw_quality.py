"""The figure of what distillation keeps at every schedule, from the rows of bench_quality.py.

    python benchmarks/distillation/draw_quality.py benchmarks/results/distillation_<...>.jsonl docs/figures/<name>.svg

A panel for each target. A point is the mean over seeds of the validation loss at one schedule; the teacher is dashed.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from transmamba.report import figures
from transmamba.schedule import TransPointSchedule

COLOURS = {
    "descend": figures.TRANSMAMBA_COLOUR,
    "mohawk": figures.LAYER_HYBRID_COLOUR,
    "plain_kl": figures.MAMBA2_COLOUR,
}
TEACHER_COLOUR = figures.TRANSFORMER_COLOUR
SVG = {"svg.fonttype": "path", "svg.hashsalt": "transmamba"}  # the same bytes every time

Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(figures.STYLE | SVG):
        quality_figure(rows).savefig(options.figure, metadata={"Date": None, "Creator": None})


def quality_figure(rows: Rows) -> Figure:
    teacher = next(row for row in rows if row["name"] == "teacher")
    done = [row for row in rows if "schedules" in row]
    targets = list(dict.fromkeys(target_of(row) for row in done))
    figure = Figure(figsize=(1.4 * figures.WIDTH, 3.9), layout="constrained")
    for axes, target in zip(figure.subplots(1, len(targets), sharey=True, squeeze=False)[0], targets, strict=True):
        for (recipe, colour), marker in zip(COLOURS.items(), figures.MARKERS, strict=False):
            own = [row for row in done if (row["recipe"], target_of(row)) == (recipe, target)]
            axes.plot(*curve(own, teacher["seq_len"]), label=recipe, color=colour, marker=marker)
        axes.axhline(teacher["loss"], label="teacher", color=TEACHER_COLOUR, linestyle="--", linewidth=1.5, zorder=1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_title(f"distilled to {target}")
    figure.supxlabel("token mixing that attention does (the rest is state space)", fontsize=10.5)
    figure.supylabel("validation loss (nats a token)", fontsize=10.5)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9.5, handlelength=1.6)
    return figure


def target_of(row: Mapping[str, Any]) -> str:
    """Rows are named "recipe, target, tokens, seed"."""
    return str(row["name"]).split(", ")[1]


def curve(rows: Rows, seq_len: int) -> tuple[list[float], list[float]]:
    """The share of attention of every schedule, which all seeds share, and the mean loss."""
    together = list(zip(*(row["schedules"] for row in rows), strict=True))
    shares = [TransPointSchedule(one[0]["trans_points"]).attention_share(seq_len) for one in together]
    return shares, [mean(seed["loss"] for seed in one) for one in together]


if __name__ == "__main__":
    main()
