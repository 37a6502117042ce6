"""transmamba generate: continue a prompt, printing as it is written."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A model folder, such as runs/quickstart/student/model.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; empty starts a new document.")] = "",
    trans_points: Annotated[
        str | None,
        typer.Option(help='Run with another schedule: a name such as "mamba2", or a list such as "0,128,none".'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens that hold this share.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Equal seeds write equal text on one machine.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    mark: Annotated[bool, typer.Option(help="Mark where layers switch.")] = True,
) -> None:
    """Continue a prompt, marking where layers pass from attention to their state."""
    from transmamba.inference import continue_prompt, load_checkpoint, resolve_device

    model, tokenizer = load_checkpoint(checkpoint)
    model.to(resolve_device(device))
    if trans_points is not None:
        model.set_trans_points(trans_points)
    schedule = model.config.schedule
    out, notes = Console(soft_wrap=True, highlight=False), Console(stderr=True)
    out.print(Text(prompt, style="bold"), end="")
    last = [-1]

    def show(position: int, text: str) -> None:
        crossed = sorted({point for point in schedule if point and last[0] >= 0 and last[0] < point <= position})
        for point in crossed if mark else ():
            switched = schedule.modes_at(point).count("ssm")
            notes.print(
                Text(f"\n[token {point:,}: {switched} of {len(schedule)} layers are state space now]", style="dim")
            )
        out.print(Text(text), end="")
        last[0] = position

    result = continue_prompt(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        on_piece=show,
    )
    out.print()
    notes.print(
        f"[dim]{result.end - result.prompt_tokens:,} tokens after {result.prompt_tokens:,}; "
        f"cache {result.cache_bytes:,} bytes; schedule {schedule}[/dim]"
    )
