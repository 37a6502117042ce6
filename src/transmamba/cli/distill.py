"""`transmamba distill`: a teacher's knowledge goes into a TransMamba while its TransPoints come down."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from transmamba.recipes import DistilledModel


def distill(
    teacher: Annotated[
        str, typer.Option(help="The folder of a causal language model, or one that `transmamba record` wrote.")
    ],
    student: Annotated[str, typer.Option(help="The folder of a TransMamba, such as `transmamba convert` writes.")],
    data: Annotated[
        str | None,
        typer.Option(help="Text: a file, folder or glob, a Hugging Face data set, or builtin:python-docs."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to read, in all stages together. Default: the recipe's.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help='TransPoints to arrive at: a name such as "v9", or a list. Default: the student\'s.'),
    ] = None,
    recipe: Annotated[str, typer.Option(help="descend, mohawk or plain_kl, or path/to/file.py:function.")] = "descend",
    output: Annotated[
        Path | None, typer.Option(help="The folder to write. Default: runs/ and the recipe's name.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a field of the recipe, such as seed=1."),
    ] = None,
) -> None:
    """Distil a teacher into a TransMamba while its TransPoints come down."""
    from rich.console import Console

    from transmamba.cli._settings import assignments, logging_to
    from transmamba.recipes import distil, find_distillation, with_fields

    named = {
        "teacher": teacher,
        "student": student,
        "text.source": data,
        "max_tokens": None if tokens is None else str(tokens),
        "schedule": schedule,
        "output": None if output is None else str(output),
    }
    changes = {name: value for name, value in named.items() if value is not None} | assignments(settings)
    run = with_fields(find_distillation(recipe)(), changes)
    with logging_to(Console(stderr=True)):
        done = distil(run, resume=resume, device=device)
    _print_summary(Console(), done)


def _print_summary(console: "Console", done: "DistilledModel") -> None:
    from rich.table import Table

    table = Table(title=done.run.name, show_header=False, title_justify="left")
    table.add_row("teacher", done.run.teacher)
    table.add_row("TransPoints", str(done.model.config.schedule))
    for name, history in done.histories.items():
        last = history.training[-1]
        table.add_row(
            f"stage {name}",
            f"{last.step:,} steps, {last.tokens:,} tokens, {last.seconds:,.0f} s, loss {last.loss:.4f}",
        )
    if done.evaluation is not None:
        table.add_row("validation loss", f"{done.evaluation.loss:.4f} nats per token")
        table.add_row("", f"{done.evaluation.bits_per_byte:.4f} bits per byte")
    table.add_row("model", str(done.model_folder))
    console.print(table)
