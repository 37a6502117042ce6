"""`transmamba adapt`: a pretrained Transformer of images becomes a Mamba."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from transmamba.recipes import AdaptationRun, AdaptedModel


def adapt(
    teacher: Annotated[
        str, typer.Option(help='The folder or Hugging Face id of a ViT or DeiT, or "new" to train one first.')
    ],
    student: Annotated[
        str, typer.Option(help="A Mamba backbone, such as plain_mamba_tiny or vim_tiny.")
    ] = "plain_mamba_tiny",
    data: Annotated[
        str,
        typer.Option(
            help="A folder of images, with a folder for each class; a Hugging Face data set; or builtin:digits."
        ),
    ] = "builtin:digits",
    task: Annotated[str, typer.Option(help="What the student is for: image-classification.")] = "image-classification",
    recipe: Annotated[
        str,
        typer.Option(
            help="adapt, adapt_v2, adapt_v1, distil_only, weight_reuse, from_scratch, soft_logits, public_release, "
            "bridging, mixing, or path/to/file.py:function."
        ),
    ] = "adapt",
    output: Annotated[
        Path | None, typer.Option(help="The folder to write. Default: runs/ and the recipe's name.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the table of the subcloning, write nothing.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a field of the recipe, such as epochs=20."),
    ] = None,
) -> None:
    """Turn a pretrained Transformer of images into a Mamba."""
    from rich.console import Console

    from transmamba.cli._settings import assignments, logging_to
    from transmamba.errors import RecipeError
    from transmamba.recipes import adapt_images, find_adaptation, with_fields

    if task != "image-classification":
        raise RecipeError(f"task={task!r} is unknown; there is image-classification.")
    named = {
        "teacher": teacher,
        "student": student,
        "images.source": data,
        "output": None if output is None else str(output),
    }
    changes = {name: value for name, value in named.items() if value is not None} | assignments(settings)
    run = with_fields(find_adaptation(recipe)(), changes)
    if dry_run:
        _print_plan(run)
        return
    with logging_to(Console(stderr=True)):
        done = adapt_images(run, resume=resume, device=device)
    _print_summary(Console(), done)


def _print_plan(run: "AdaptationRun") -> None:
    from transmamba.recipes import plan_adaptation

    print(plan_adaptation(run))


def _print_summary(console: "Console", done: "AdaptedModel") -> None:
    from rich.table import Table

    table = Table(title=done.run.name, show_header=False, title_justify="left")
    table.add_row("teacher", f"{done.run.teacher}: top-1 {_percent(done.teacher_score.top_1)}")
    last = done.history.training[-1]
    table.add_row("training", f"{last.step:,} steps, {last.seconds:,.0f} s, loss {last.loss:.4f}")
    if done.plan is not None:
        table.add_row("from the teacher", f"{_percent(done.plan.share_from_teacher)} of the parameters")
    table.add_row("student top-1", _percent(done.student_score.top_1))
    table.add_row("student top-5", _percent(done.student_score.top_5))
    table.add_row("model", str(done.model_folder))
    table.add_row("report", str(done.report))
    console.print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
