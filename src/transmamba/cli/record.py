"""`transmamba record`: a teacher runs once, and its most probable next tokens are kept for `transmamba distill`."""

from pathlib import Path
from typing import Annotated

import typer


def record(
    teacher: Annotated[str, typer.Argument(help="The folder of a causal language model.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; one that holds a part of the same is completed.")],
    data: Annotated[
        str, typer.Option(help="Text: a file, folder or glob, a Hugging Face data set, or builtin:python-docs.")
    ] = "builtin:python-docs",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to store. Default: all that the text has for training.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a setting, such as k=32 or seq_len=1024."),
    ] = None,
) -> None:
    """Store a teacher's most probable next tokens, for distillation without it."""
    from rich.console import Console

    from transmamba.cli._settings import assignments
    from transmamba.recipes import RecordingRun, record_teacher, with_fields

    changes = {"teacher": teacher, "output": str(out), "text.source": data}
    if tokens is not None:
        changes["max_tokens"] = str(tokens)
    info = record_teacher(with_fields(RecordingRun(), changes | assignments(settings)), device=device)
    Console().print(
        f"{out}: the {info.k} most probable of {info.vocab_size:,} tokens at {info.num_tokens:,} places, "
        f"{info.bytes_per_token} bytes a token, {info.num_tokens * info.bytes_per_token / 1e6:,.1f} MB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
