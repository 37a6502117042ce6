"""`transmamba train`: carry out a recipe, by name or from a file of your own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from transmamba.recipes import TrainedModel


def train(
    recipe: Annotated[str, typer.Argument(help="A name, such as python_docs_v9, or path/to/file.py:function.")],
    text: Annotated[
        str | None,
        typer.Option(help="What to train on: a file, folder or glob, a Hugging Face data set, or builtin:python-docs."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help='"bytes", "train:2048", a tokenizer.json, a folder that holds one, or a Hub name.'),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder to write. Default: runs/ and the recipe's name.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a field of the recipe, such as learning_rate=1e-3."),
    ] = None,
) -> None:
    """Train a language model from a recipe."""
    from rich.console import Console

    from transmamba.cli._settings import assignments, logging_to
    from transmamba.recipes import find_recipe, train_language_model, with_fields

    named = {"text.source": text, "tokenizer": tokenizer, "output": None if output is None else str(output)}
    changes = {name: value for name, value in named.items() if value is not None}
    changes |= assignments(settings)
    run = with_fields(find_recipe(recipe)(), changes)

    with logging_to(Console(stderr=True)):
        trained = train_language_model(run, resume=resume, device=device)
    _print_summary(Console(), trained)


def _print_summary(console: "Console", trained: "TrainedModel") -> None:
    from rich.table import Table

    table = Table(title=trained.run.name, show_header=False, title_justify="left")
    last = trained.history.training[-1] if trained.history.training else None
    table.add_row("parameters", f"{trained.num_parameters:,}")
    if trained.model.config.model_type == "transmamba":
        table.add_row("TransPoints", str(trained.model.config.schedule))
    if last is not None:
        table.add_row("training", f"{last.step:,} steps, {last.tokens:,} tokens, {last.seconds:,.0f} s")
        table.add_row("speed", f"{last.tokens / last.seconds:,.0f} tokens/s" if last.seconds else "not measured")
        table.add_row("training loss", f"{last.loss:.4f} nats per token")
    if trained.evaluation is not None:
        table.add_row("validation loss", f"{trained.evaluation.loss:.4f} nats per token")
        table.add_row("", f"{trained.evaluation.bits_per_byte:.4f} bits per byte")
    table.add_row("model", str(trained.model_folder))
    table.add_row("history", str(trained.history.path))
    console.print(table)
