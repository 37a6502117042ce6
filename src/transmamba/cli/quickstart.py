"""transmamba quickstart: a small Transformer is trained and adapted; a table and a page say what came of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console


def quickstart(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; an earlier quickstart there is replaced. Default: runs/quickstart, or "
            "runs/quickstart-vision."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal losses on one machine.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "cpu",
    vision: Annotated[
        bool, typer.Option("--vision", help="Images in the place of text: a ViT of handwritten digits, a PlainMamba.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Every step at a size where the numbers mean nothing.")
    ] = False,
) -> None:
    """Train a small Transformer, make a student of bounded memory out of it, distil it, write report.html."""
    from rich.console import Console

    console = Console()
    if vision:
        _of_images(console, output or Path("runs/quickstart-vision"), seed, device, smoke)
    else:
        _of_text(console, output or Path("runs/quickstart"), seed, device, smoke)


def _of_text(console: "Console", output: Path, seed: int, device: str, smoke: bool) -> None:
    from transmamba.recipes.quickstart import FULL, SMOKE, run_quickstart

    report = run_quickstart(output, size=SMOKE if smoke else FULL, seed=seed, device=device)
    console.print()
    report.print_table(console)
    console.print(f"\nReport: {(output / 'report.html').resolve().as_uri()}", soft_wrap=True)
    console.print(f'Write with it: transmamba generate {output / "student"} --prompt "The argument"', soft_wrap=True)


def _of_images(console: "Console", output: Path, seed: int, device: str, smoke: bool) -> None:
    from transmamba.recipes.vision_quickstart import FULL, SMOKE, run_vision_quickstart

    report = run_vision_quickstart(output, size=SMOKE if smoke else FULL, seed=seed, device=device)
    console.print()
    report.print_table(console)
    console.print(f"\nReport: {(output / 'report.html').resolve().as_uri()}", soft_wrap=True)
