"""`transmamba bench`: how fast this machine is at the ops, at a training step, at decoding; and the kernels' tuning.

Exit code 1 when something computed wrongly; it is not timed then.
"""

import json
import shlex
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transmamba.cli._settings import assignments

if TYPE_CHECKING:
    from rich.table import Table

    from transmamba.benchmarking import DecodeResult, ModelResult, OpRow, OpsResult, TuneResult

Bars = tuple[str, str, dict[str, dict[str, float]]]  # title, unit, {group: {name: value}}


class What(StrEnum):
    """What is timed."""

    OPS = "ops"
    MODEL = "model"
    DECODE = "decode"
    TUNE = "tune"


def bench(
    what: Annotated[What, typer.Argument(help="ops, model (a training step and prefill), decode, or tune.")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    output: Annotated[
        Path, typer.Option(help="A folder for the JSON file and the figure, named for what, device and date.")
    ] = Path("runs/bench"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change what is measured, such as shapes=8x8192x16x128; several times."),
    ] = None,
) -> None:
    """Time the ops, a training step or decoding, each after it was found right at the shape that is timed.

    tune tries launch configurations of the state space's kernels and keeps the fastest for this device.
    """
    import torch
    from rich.console import Console

    from transmamba import benchmarking
    from transmamba.inference import resolve_device
    from transmamba.recipes.fields import with_fields
    from transmamba.report.speeds import speed_figure
    from transmamba.training.checkpoints import write_atomically

    measure: dict[What, tuple[Any, Any]] = {
        What.OPS: (benchmarking.measure_ops, benchmarking.OpsOptions),
        What.MODEL: (benchmarking.measure_model, benchmarking.ModelOptions),
        What.DECODE: (benchmarking.measure_decoding, benchmarking.DecodeOptions),
        What.TUNE: (benchmarking.tune_ops, benchmarking.TuneOptions),
    }
    function, options_class = measure[what]
    chosen = resolve_device(device)
    options = with_fields(options_class.for_device(chosen), assignments(set_))
    console = Console()

    def show(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    command = shlex.join(["transmamba", *sys.argv[1:]])
    with torch.random.fork_rng(devices=[]):
        result = function(chosen, options, command=command, show=show)
    output.mkdir(parents=True, exist_ok=True)
    words = result.provenance["device"].lower().split()
    name = (
        next((word for word in words if any(c.isdigit() for c in word)), words[0]) if chosen.type == "cuda" else "cpu"
    )
    path = output / f"{what.value}_{name}_{result.provenance['date']}.json"
    write_atomically(path, json.dumps(result.to_json(), indent=1) + "\n")
    present: dict[What, Callable[[Any], tuple[Any, Bars | None]]]
    present = {What.OPS: _ops, What.MODEL: _model, What.DECODE: _decode, What.TUNE: _tune}
    table, bars = present[what](result)
    console.print(table)
    if bars:
        title, unit, values = bars
        figure = path.with_suffix(".svg")
        speed_figure(values, title=f"{title}, {result.provenance['device']}", unit=unit).savefig(figure)
        show(f"Figure: {figure}")
    show(f"Numbers: {path}")
    for failure in result.failures:
        console.print(f"Wrong: {failure}", style="bold red", markup=False, soft_wrap=True)
    if result.failures:
        raise typer.Exit(1)


def _ops(result: "OpsResult") -> tuple["Table", Bars | None]:
    table = _table("", "forward", "+ backward", "spread", "host", "of floor", "error")
    together: dict[str, dict[str, dict[str, OpRow]]] = {}
    for row in result.rows:
        together.setdefault(row.shape, {}).setdefault(f"{row.kind}, {row.what}", {})[row.passes] = row
    for shape, lines in together.items():
        table.add_section()
        table.add_row(shape, style="bold")
        for name, passes in lines.items():
            last = passes.get("both", passes.get("forward"))
            assert last is not None
            first, third = last.timing.quartiles
            floor = max(last.memory_floor, last.matrix_floor)
            table.add_row(
                f"  {name}",
                *(f"{passes[key].timing.median:.3f}" if key in passes else "" for key in ("forward", "both")),
                f"{100 * (third - first) / last.timing.median:.0f} %",
                f"{last.timing.host:.3f}",
                f"{last.timing.median / floor:.1f} x" if floor else "",
                f"{last.error:.0e}",
            )
    table.title = "Milliseconds; spread, host and floor are those of the last column that is there"
    hybrid = result.hybrid
    if hybrid:
        faster = hybrid["attention_throughout_over_hybrid"]
        table.caption = (
            f"Hybrid layer, mean of the cycle with backward: {hybrid['mean']['hybrid']:.3f} ms, "
            f"{hybrid['over_its_parts']:.3f} of its parts by themselves"
            + (f", attention throughout takes {faster:.2f} times as long" if faster else "")
            + f"; the Memory Converter is {100 * hybrid['converter_share']:.1f} % of it."
        )
    values: dict[str, dict[str, float]] = {}
    for row in result.rows:
        if row.passes == "both" and row.kind in ("ssd_scan", "attention"):
            values.setdefault(row.shape, {})[row.what] = row.timing.median
    return table, ("Forward and backward", "ms", values) if values else None


def _model(result: "ModelResult") -> tuple["Table", Bars | None]:
    table = _table("schedule", "what", "tokens", "ms", "quartiles", "tokens/s", "peak GB", "error")
    values: dict[str, dict[str, float]] = {}
    for row in result.rows:
        table.add_row(
            row.schedule,
            row.what,
            f"{row.tokens:,}",
            f"{row.timing.median:.2f}",
            f"{row.timing.quartiles[0]:.2f} - {row.timing.quartiles[1]:.2f}",
            f"{row.tokens_per_second:,.0f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.1f}",
            f"{row.error:.1e}",
        )
        values.setdefault(f"{row.what}, {row.tokens:,} tokens", {})[row.schedule] = row.tokens_per_second
    ratios = [
        f"{what}: {ratio:.2f} x, {names}" for what, pairs in result.ratios.items() for names, ratio in pairs.items()
    ]
    table.caption = "; ".join(ratios) or None
    return table, ("Speed", "tokens/s", values) if values else None


def _decode(result: "DecodeResult") -> tuple["Table", Bars | None]:
    table = _table("schedule", "rows", "context", "step ms", "quartiles", "tokens/s", "cache MB", "peak GB", "error")
    values: dict[str, dict[str, float]] = {}
    for row in result.rows:
        timing = row.timing
        table.add_row(
            row.schedule,
            str(timing.batch),
            f"{timing.context:,}",
            f"{timing.step_ms:.3f}",
            f"{timing.quartiles[0]:.3f} - {timing.quartiles[1]:.3f}",
            f"{timing.tokens_per_second:,.1f}",
            f"{timing.cache_bytes / 1e6:,.1f}",
            "" if timing.peak_bytes is None else f"{timing.peak_bytes / 1e9:.1f}",
            f"{row.error:.1e}",
        )
        what = f"{timing.batch} rows after {timing.context:,} tokens"
        values.setdefault(what, {})[row.schedule] = timing.tokens_per_second
    return table, ("Decoding", "tokens/s", values) if values else None


def _tune(result: "TuneResult") -> tuple["Table", Bars | None]:
    table = _table("shape", "changed", "forward", "+ backward", "before", "before + backward")
    for shape, changes in result.chosen.items():
        trials = [trial for trial in result.trials if trial.shape == shape and not trial.failure]
        fastest = min(trials, key=lambda trial: trial.time_of("both"))
        times = (fastest.forward, fastest.both, trials[0].forward, trials[0].both)
        table.add_row(shape, ", ".join(changes) or "nothing", *(f"{x:.3f}" for x in times))
    table.caption = f"Kept in {result.file}" if result.file else "Nothing was kept"
    return table, None


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(
        box=None, pad_edge=False, header_style="dim", title_justify="left", title_style="dim", caption_justify="left"
    )
    for column in columns:
        words = column in ("", "schedule", "what", "shape", "changed")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words)
    return table
