"""transmamba quickstart: four small models on what ships with Python, compared in a table and a page."""

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
    """Train four small models on Python's documentation, compare them, write report.html."""
    from rich.console import Console

    from transmamba.recipes.quickstart import FULL, SMOKE, run_quickstart

    console = Console()
    report = run_quickstart(output, size=SMOKE if smoke else FULL, seed=seed, device=device)
    console.print()
    report.print_table(console)
    console.print(f"\nReport: {(output / 'report.html').resolve().as_uri()}", soft_wrap=True)
    console.print(f'Write with it: transmamba generate {output / "v9"} --prompt "The argument"', soft_wrap=True)
