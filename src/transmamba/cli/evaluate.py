"""`transmamba evaluate`: what a language model scores on a text or on tasks of lm-eval, or an encoder on captions."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from transmamba.errors import CheckpointError, InputError, RecipeError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from transmamba.tasks import Evaluation, HarnessResult


def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(help="The folder of a model or of a run; also one of transformers' own, or a Hugging Face id."),
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help="What to score: a file, folder or glob, a Hugging Face data set, or builtin:python-docs; all of it. "
            "Default: the validation documents of the run."
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a window of text. Default: the positions the model was made for.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead of a text: tasks of lm-eval, by name, and .jsonl files with context, choices and label; "
            "separated by commas."
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help='Instead of a text: a .jsonl file of {"captions": [...]}, a photo a line. A sentence encoder finds '
            "another caption of the same photo."
        ),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="A folder of lm-eval's YAML files that defines more tasks.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many documents of each task, the first ones.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question. Default: what the task says.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows or requests at a time. Default: 8, or 16.")] = None,
    trans_points: Annotated[
        str | None,
        typer.Option(help='Run with another schedule: a name such as "mamba2", or a list such as "0,128,none".'),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Also write everything to this file.")] = None,
) -> None:
    """Measure the loss per byte of a model and the loss by position, or its scores on tasks or captions."""
    from json import dumps

    from rich.console import Console

    from transmamba.inference import load_language_model, resolve_device
    from transmamba.models import TransMambaForCausalLM
    from transmamba.training.checkpoints import write_atomically

    if captions is not None:
        _check_captions_alone(text, seq_len, tasks, task_folder, limit, num_fewshot, trans_points)
        _evaluate_captions(Console(), checkpoint, captions, resolve_device(device), batch_size or 64, json)
        return
    _check_flags(text=text, seq_len=seq_len, tasks=tasks, only_tasks=(task_folder, limit, num_fewshot))
    if json is not None and not json.parent.is_dir():
        raise RecipeError(f"--json {json}: there is no folder {json.parent}; make it first.")
    chosen = resolve_device(device)
    model, tokenizer = load_language_model(checkpoint)
    if trans_points is not None:
        if not isinstance(model, TransMambaForCausalLM):
            raise InputError(
                f"{checkpoint} is a {type(model).__name__} and has no TransPoints; leave --trans-points out, or make a "
                "TransMamba of it with transmamba convert."
            )
        model.set_trans_points(trans_points)
    console = Console()
    if tasks is None:
        content = _evaluate_text(console, checkpoint, model, tokenizer, chosen, text, seq_len, batch_size or 8)
    else:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        options = {"task_folder": task_folder, "limit": limit, "num_fewshot": num_fewshot}
        content = _evaluate_tasks(console, checkpoint, model, tokenizer, chosen, names, batch_size or 16, options)
    if json is not None:
        write_atomically(json, dumps({"checkpoint": checkpoint, **content}, indent=2) + "\n")


def _check_captions_alone(*others: Any) -> None:
    if any(value is not None for value in others):
        raise RecipeError("--captions takes --batch-size, --device and --json; run the command once for each measure.")


def _evaluate_captions(
    console: "Console", checkpoint: str, captions: Path, device: "torch.device", batch_size: int, json: Path | None
) -> None:
    from functools import partial
    from json import dumps

    from rich.table import Table

    from transmamba.inference import embed_texts, load_text_encoder
    from transmamba.tasks import evaluate_caption_retrieval, read_captions
    from transmamba.training.checkpoints import write_atomically

    photos = read_captions(captions)
    model, tokenizer = load_text_encoder(checkpoint, device=device)
    score = evaluate_caption_retrieval(partial(embed_texts, model, tokenizer, batch_size=batch_size), photos)
    table = Table(title=f"{checkpoint} on {captions}", show_header=False, title_justify="left")
    for within in (1, 5, 10):
        table.add_row(f"recall at {within}", f"{100 * getattr(score, f'recall_at_{within}'):.1f} %")
    table.add_row("mean rank", f"{score.mean_rank:.2f} of {score.num_photos:,}")
    console.print(table)
    if json is not None:
        write_atomically(json, dumps({"checkpoint": checkpoint, "captions": asdict(score)}, indent=2) + "\n")


def _check_flags(*, text: str | None, seq_len: int | None, tasks: str | None, only_tasks: tuple[Any, ...]) -> None:
    if tasks is not None and (text is not None or seq_len is not None):
        raise RecipeError(
            "--tasks scores tasks, and --text and --seq-len are for a text; run the command once for each."
        )
    if tasks is None and any(value is not None for value in only_tasks):
        raise RecipeError("--task-folder, --limit and --num-fewshot are for tasks; name some with --tasks.")
    if seq_len is not None and seq_len < 2:
        raise InputError(f"--seq-len {seq_len} must be at least 2, to have a token to predict.")


def _evaluate_text(
    console: "Console",
    checkpoint: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    device: "torch.device",
    text: str | None,
    seq_len: int | None,
    batch_size: int,
) -> dict[str, Any]:
    from transformers import PreTrainedTokenizerFast

    from transmamba.compatibility import check_teacher_length
    from transmamba.data import load_documents, pack_documents
    from transmamba.recipes import validation_source
    from transmamba.tasks import evaluate_language_model

    length = seq_len or getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise InputError(f"{checkpoint} does not say how long its texts may be; give --seq-len.")
    if _trans_points(model) is None:  # a TransMamba may be run beyond the length that it was trained at
        check_teacher_length(model.config, length)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(f"The tokenizer of {checkpoint} has no tokenizer.json; save it as a fast one.")
    source, is_whole = validation_source(checkpoint, text)
    documents = load_documents(source)
    scored = documents.train if is_whole else documents.validation
    if not scored:
        raise RecipeError(f"{source.source} has no validation documents; name a text with --text.")
    dataset = pack_documents(scored, tokenizer, length, drop_last=False)
    evaluation = evaluate_language_model(model, dataset, batch_size=batch_size, device=device)
    _print_title(console, checkpoint, source.source, model)
    _print_evaluation(console, evaluation)
    return {
        "text": source.source,
        "trans_points": _trans_points(model),
        "seq_len": length,
        **asdict(evaluation),
    }


def _evaluate_tasks(
    console: "Console",
    checkpoint: str,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    device: "torch.device",
    names: list[str],
    batch_size: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    import platform
    from datetime import UTC, datetime
    from importlib.metadata import version

    import torch

    from transmamba._version import __version__
    from transmamba.tasks import evaluate_tasks

    # 16-bit weights are exact in fp32, and a CPU computes faster and more exactly with it.
    model = model.float() if device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16) else model
    result = evaluate_tasks(model.to(device), tokenizer, names, batch_size=batch_size, **options)
    _print_title(console, checkpoint, "lm-eval", model)
    _print_scores(console, result)
    folder = options["task_folder"]
    return {
        "model": type(model).__name__,
        "trans_points": _trans_points(model),
        "tasks": names,
        **options,
        "task_folder": None if folder is None else str(folder),
        "batch_size": batch_size,
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "transmamba": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("transformers", "lm_eval", "datasets")},
            "tasks": result.versions,
        },
        "num_truncated": result.num_truncated,
        "scores": [asdict(score) for score in result.scores],
    }


def _trans_points(model: "PreTrainedModel") -> list[int | None] | None:
    """The schedule of a TransMamba; None for other models."""
    from transmamba.models import TransMambaForCausalLM

    return model.config.schedule.to_list() if isinstance(model, TransMambaForCausalLM) else None


def _print_title(console: "Console", checkpoint: str, what: str, model: "PreTrainedModel") -> None:
    points = _trans_points(model)
    kind = type(model).__name__ if points is None else f"TransPoints {model.config.schedule}"
    console.print(f"{checkpoint} on {what}, {kind}", markup=False, highlight=False, soft_wrap=True)


def _print_scores(console: "Console", result: "HarnessResult") -> None:
    from rich.table import Table

    table = Table()
    table.add_column("task", overflow="fold")
    table.add_column("metric", no_wrap=True)
    for name in ("value", "± error", "documents", "examples"):
        table.add_column(name, justify="right")
    last = None
    for score in result.scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        error = "" if score.standard_error is None else f"± {score.standard_error:.4f}"
        task, last = "" if score.task == last else score.task, score.task
        table.add_row(
            task, metric + arrow, f"{score.value:.4f}", error, f"{score.num_samples:,}", str(score.num_fewshot)
        )
    console.print(table, markup=False)
    if result.num_truncated:
        console.print(
            f"{result.num_truncated:,} requests were longer than the model's positions and lost their beginning.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


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
