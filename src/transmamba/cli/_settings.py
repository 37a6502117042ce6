"""What the verbs that carry out a recipe share: `--set NAME=VALUE`, and a log that the user sees."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler

from transmamba.errors import RecipeError


def assignments(texts: Sequence[str] | None) -> dict[str, str]:
    """The fields and values of --set, in the order they were given."""
    return dict(map(_assignment, texts or []))


@contextmanager
def logging_to(console: Console) -> Iterator[None]:
    """Show the library's own log on the console within."""
    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logger = logging.getLogger("transmamba")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"--set {text!r} is not of the form NAME=VALUE, such as learning_rate=1e-3.")
    return name.strip(), value
