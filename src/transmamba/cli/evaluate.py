"""`transmamba evaluate`: what a trained model scores on a text, per token, per byte and by position."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transmamba.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from transmamba.tasks import Evaluation


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="The folder of a model, or of a run.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="What to score: a file, folder or glob, a Hugging Face data set, or builtin:python-docs; all of it. "
            "Default: the validation documents of the run."
        ),
    ] = None,
    trans_points: Annotated[
        str | None,
        typer.Option(help='Run with another schedule: a name such as "mamba2", or a list such as "0,128,none".'),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Also write everything to this file.")] = None,
) -> None:
    """Measure the loss per byte of a model, and the loss by position."""
    from dataclasses import asdict
    from json import dumps

    from rich.console import Console

    from transmamba.data import load_documents, pack_documents
    from transmamba.inference.checkpoint import load_checkpoint
    from transmamba.inference.device import resolve_device
    from transmamba.recipes import validation_source
    from transmamba.tasks import evaluate_language_model
    from transmamba.training.checkpoints import write_atomically

    if json is not None and not json.parent.is_dir():
        raise RecipeError(f"--json {json}: there is no folder {json.parent}; make it first.")
    chosen = resolve_device(device)
    model, tokenizer = load_checkpoint(checkpoint)
    if trans_points is not None:
        model.set_trans_points(trans_points)
    source, is_whole = validation_source(checkpoint, text)
    documents = load_documents(source)
    scored = documents.train if is_whole else documents.validation
    if not scored:
        raise RecipeError(f"{source.source} has no validation documents; name a text with --text.")
    seq_len = model.config.max_position_embeddings
    dataset = pack_documents(scored, tokenizer, seq_len, drop_last=False)
    evaluation = evaluate_language_model(model, dataset, device=chosen)
    if json is not None:
        content = {
            "checkpoint": str(checkpoint),
            "text": source.source,
            "trans_points": model.config.schedule.to_list(),
            "seq_len": seq_len,
            **asdict(evaluation),
        }
        write_atomically(json, dumps(content, indent=2) + "\n")
    console = Console()
    console.print(
        f"{checkpoint} on {source.source}, TransPoints {model.config.schedule}", markup=False, highlight=False
    )
    _print_evaluation(console, evaluation)


def _print_evaluation(console: "Console", evaluation: "Evaluation") -> None:
    from rich.table import Table

    total = Table(show_header=False)
    total.add_row("loss", f"{evaluation.loss:.4f} nats per token")
    total.add_row("", f"{evaluation.bits_per_byte:.4f} bits per byte")
    total.add_row("scored", f"{evaluation.num_tokens:,} tokens, {evaluation.num_bytes:,} bytes")
    console.print(total)
    by_position = Table(title="by position in the document", title_justify="left")
    for name in ("positions", "nats per token", "tokens"):
        by_position.add_column(name, justify="right")
    for row in evaluation.loss_by_position:
        positions = str(row.start) if row.end == row.start + 1 else f"{row.start:,} to {row.end - 1:,}"
        by_position.add_row(positions, f"{row.loss:.4f}", f"{row.num_tokens:,}")
    console.print(by_position)
