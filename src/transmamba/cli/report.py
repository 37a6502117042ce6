"""transmamba report: what a student kept of its teacher, what it gained and what that costs, on one page."""

from pathlib import Path
from typing import Annotated

import typer

from transmamba.errors import RecipeError


def report(
    student: Annotated[Path, typer.Argument(help="The folder of a student, such as transmamba convert writes.")],
    against: Annotated[str, typer.Option(help="Its teacher: the folder of a checkpoint, or a Hugging Face id.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="What to measure on, best unseen by both: a file, folder or glob, a Hugging Face data set, or "
            "builtin:python-docs, which is the default."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A folder, or the .html file to write. Default: runs/ and the student's name, -report."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change what is measured, such as eval_tokens=1000000."),
    ] = None,
) -> None:
    """Compare a student with its teacher: quality, recall, speed and memory."""
    from rich.console import Console

    from transmamba.recipes import ReportSettings, report_student, with_fields

    changes = {} if text is None else {"text.source": text}
    changes |= dict(map(_assignment, settings or []))
    folder = output or Path("runs") / f"{student.absolute().name}-report"
    console = Console()
    made = report_student(
        student, against, output=folder, settings=with_fields(ReportSettings(), changes), device=device
    )
    made.print_table(console)
    page = folder if folder.suffix.lower() in (".html", ".htm") else folder / "student_report.html"
    console.print(f"\nReport: {page.resolve().as_uri()}", soft_wrap=True)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"--set {text!r} is not of the form NAME=VALUE, such as eval_tokens=1000000.")
    return name.strip(), value
