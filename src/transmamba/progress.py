"""A progress bar for work that may take more than a second, and silence for other people's."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

__all__ = ["progress_bar", "without_progress_bars", "working"]

SECONDS_BEFORE_SHOWN = 1.0


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that reports an amount of work done, out of `total`.

    The bar is drawn on stderr if that is a terminal, appears after one second, and is erased at the end.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(description, total=total)
    began = time.monotonic()

    def advance(amount: int) -> None:
        bar.advance(task, amount)
        if not bar.live.is_started and time.monotonic() - began > SECONDS_BEFORE_SHOWN:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def working(description: str) -> Iterator[None]:
    """Show that something is under way whose amount is not known, on stderr if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(description):
        yield


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars for files that are written and read in a moment."""
    from transformers.utils import logging

    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
