"""transmamba quickstart: a small Transformer is trained, converted and distilled; a table and a page say what came."""

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder to write; an earlier quickstart there is replaced.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Equal seeds give equal losses on one machine.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "cpu",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Every step at a size where the numbers mean nothing.")
    ] = False,
) -> None:
    """Train a small Transformer on Python's documentation, convert it, distil it to V9, write report.html."""
    from rich.console import Console

    from transmamba.recipes.quickstart import FULL, SMOKE, run_quickstart

    console = Console()
    report = run_quickstart(output, size=SMOKE if smoke else FULL, seed=seed, device=device)
    console.print()
    report.print_table(console)
    console.print(f"\nReport: {(output / 'report.html').resolve().as_uri()}", soft_wrap=True)
    console.print(f'Write with it: transmamba generate {output / "student"} --prompt "The argument"', soft_wrap=True)
