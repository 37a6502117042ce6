"""How a mistake looks on the command line: one line on stderr and an exit code."""

import os
import traceback
from typing import Final, cast

import typer
from rich.console import Console
from rich.text import Text

from transmamba.errors import TransMambaError

MENDABLE: Final = (TransMambaError, OSError, ModuleNotFoundError)
# What typer raises for a word or flag it cannot place. It exports the child only, and has moved the parent.
USAGE: Final = cast(type[typer.BadParameter], typer.BadParameter.__base__)
MISTAKE: Final = 2
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells report it


def report_mistake(error: TransMambaError | OSError | ModuleNotFoundError, *, debug: bool) -> int:
    """Print what went wrong in one line, below its trace when debugging; return the exit code."""
    if debug:
        traceback.print_exception(error)
    _print_line("Error: ", _in_one_line(error))
    return MISTAKE


def report_usage(error: typer.BadParameter) -> int:
    """Print what typer could not place, and where the help is; return the exit code."""
    command = error.ctx.command_path if error.ctx else "transmamba"
    message = error.format_message()
    _print_line("Error: ", message + ("" if message.endswith((".", "?")) else ".") + f" See {command} --help.")
    return MISTAKE


def report_interrupt() -> int:
    """Say that the user stopped the command; return the exit code."""
    _print_line("Interrupted", "")
    return INTERRUPTED


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        return " -> ".join(files) + (": " if files else "") + error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _print_line(head: str, message: str) -> None:
    # soft_wrap leaves the line whole, so that it can be searched for; Text keeps [brackets] from being read as markup.
    Console(stderr=True).print(Text.assemble((head, "bold red"), message), soft_wrap=True)
