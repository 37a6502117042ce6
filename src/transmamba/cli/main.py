"""transmamba VERB: find the verb, run it, turn mistakes into one line and an exit code.

A verb is a line of VERBS and a function of the same name in the file of the same name. The file is imported when
the verb runs, so `transmamba --help` needs neither torch nor transformers.

Exit codes: 0 done; 1 a check failed; 2 a mistake the user can mend; 130 interrupted.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, Any

import typer

from transmamba._version import __version__
from transmamba.cli._errors import INTERRUPTED, MENDABLE, USAGE, report_interrupt, report_mistake, report_usage
from transmamba.memory import keep_freed_memory

VERBS = {
    "quickstart": "Train a small Transformer on what ships with Python, convert and distil it, write a report.",
    "train": "Train a language model from a recipe.",
    "generate": "Continue a prompt.",
    "evaluate": "Measure the loss per byte of a model and the loss by position, or its scores on tasks.",
    "schedule": "Show a TransPoint schedule: its modes, FLOPs and cache bytes.",
    "convert": "Convert a pretrained Transformer without changing what it computes.",
    "distill": "Distil a teacher into a TransMamba while its TransPoints come down.",
    "adapt": "Turn a pretrained Transformer of images into a Mamba.",
    "record": "Store a teacher's most probable next tokens, for distillation without it.",
    "report": "Compare a student with its teacher: quality, recall, speed and memory.",
    "bench": "Time the ops, a training step or decoding here, beside others' and what the device allows.",
    "doctor": "Show versions, devices and backends, and check every op on this machine.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; arguments are those of the process when None."""
    arguments, debug = _take_debug(sys.argv[1:] if arguments is None else arguments)
    try:
        command = typer.main.get_command(build_app(_verb_of(arguments)))
        code = command(args=arguments or ["--help"], prog_name="transmamba", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except USAGE as error:
        return report_usage(error)
    except MENDABLE as error:
        return report_mistake(error, debug=debug)
    return report_interrupt() if code == INTERRUPTED else code or 0  # typer makes a code of an interrupt by itself


def build_app(verb: str | None) -> typer.Typer:
    """Return the app with every verb listed; only `verb`, the one about to run, is imported."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    for name, summary in VERBS.items():
        app.command(name, short_help=summary)(_keeping_memory(load_verb(name)) if name == verb else _listed_only)
    return app


def load_verb(name: str) -> Callable[..., None]:
    """Return the function of a verb, importing its file."""
    function: Callable[..., None] = getattr(importlib.import_module(f"transmamba.cli.{name}"), name)
    return function


def _keeping_memory(function: Callable[..., None]) -> Callable[..., None]:
    """The same verb, which keeps the memory it frees where it computes on a CPU."""

    @wraps(function)
    def run(**options: Any) -> None:
        if _is_cpu(options.get("device")):
            keep_freed_memory()
        function(**options)

    return run


def _is_cpu(device: str | None) -> bool:
    if device != "auto":
        return device is not None and device.startswith("cpu")
    from transmamba.inference import resolve_device  # torch, which every verb with a device needs

    return resolve_device().type == "cpu"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"transmamba {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the trace of an error (also after the verb, or TRANSMAMBA_DEBUG=1).")
    ] = False,
) -> None:
    """Language models that are attention up to a TransPoint and a state space after it."""


def _listed_only() -> None:
    raise AssertionError("a verb that was listed but not imported has been run")


def _take_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Return the arguments without --debug, which may stand anywhere before `--`, and whether it was asked for."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    rest = [argument for argument in arguments[:end] if argument != "--debug"]
    wanted = len(rest) < end or os.environ.get("TRANSMAMBA_DEBUG", "0") not in ("", "0")
    return [*rest, *arguments[end:]], wanted


def _verb_of(arguments: Sequence[str]) -> str | None:
    # No option before the verb takes a value, so the first word is the verb.
    return next((argument for argument in arguments if not argument.startswith("-")), None)
