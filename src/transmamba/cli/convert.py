"""transmamba convert: a pretrained Transformer becomes a TransMamba that computes the same until told to switch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from transmamba.conversion import ConversionPlan


def convert(
    source: Annotated[str, typer.Argument(help="The folder of a checkpoint, or a Hugging Face id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must be empty or not there yet.")],
    schedule: Annotated[
        str, typer.Option(help='TransPoints of the student: a name such as "v9", or a list such as "0,128,none".')
    ] = "transformer",
    seq_len: Annotated[
        int | None,
        typer.Option(help="The length the student is meant for; scales a named schedule. Default: the source's."),
    ] = None,
    initialisation: Annotated[
        str | None,
        typer.Option(
            help="How the state space begins: calibrated, local, averages or mamba2. Default: the first possible."
        ),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help="Text that the state space is fitted to: a file, folder or glob, or a data set.")
    ] = "builtin:python-docs",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the table of the conversion, write nothing.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "auto",
) -> None:
    """Convert a pretrained Transformer without changing what it computes."""
    from rich.console import Console

    from transmamba.conversion import LARGEST_DIFFERENCE, convert_checkpoint, plan_conversion
    from transmamba.data import TextSource, load_documents
    from transmamba.inference import resolve_device

    chosen = resolve_device(device)
    console = Console()
    if dry_run:
        plan = plan_conversion(source, schedule=schedule, seq_len=seq_len, initialisation=initialisation)
        _print_plan(Console(width=console.width if console.is_terminal else 160), plan)
        return
    texts = load_documents(TextSource(source=calibration, validation_share=0)).train
    done = convert_checkpoint(
        source, out, schedule=schedule, seq_len=seq_len, initialisation=initialisation, texts=texts, device=chosen
    )
    for note in done.plan.notes:
        console.print(note, markup=False, highlight=False)
    console.print(
        f"{done.folder}: {len(done.plan.copied)} parameters from {source}, "
        f"{len(done.plan.fresh)} fresh ({done.plan.initialisation}), "
        f"TransPoints {','.join('none' if point is None else str(point) for point in done.plan.trans_points)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"Largest relative logit difference with every TransPoint at none: {done.difference:.1e} "
        f"(at most {LARGEST_DIFFERENCE:g}, fp32, on {' and '.join(done.checked)})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _print_plan(console: "Console", plan: "ConversionPlan") -> None:
    from rich.table import Table

    table = Table(title=f"{plan.source} ({plan.family})", title_justify="left")
    for name in ("parameter", "", "from, or initial value"):
        table.add_column(name, overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    for row in plan:
        table.add_row(row.target, row.kind, row.origin, "x".join(map(str, row.shape)))
    for tensor in plan.ignored:
        table.add_row("", "ignored", f"{tensor.source}: {tensor.reason}", "x".join(map(str, tensor.shape)))
    console.print(table, markup=False)
    for note in plan.notes:
        console.print(note, markup=False, highlight=False)
