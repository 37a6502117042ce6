"""Multiple choice out of a file of JSON lines, in one of three forms, told by the fields of the first row.

    {"context": "Water boils at", "choices": ["100 C.", "20 C."], "label": 0}
    {"context": "The cup does not fit, as _ is too small.", "choices": ["the bag", "the cup"], "label": 0}
    {"good": "Who left?", "bad": "Who leaves did?"}

First: a choice continues the context after a space. Second, where every context has one blank `_`: the choice fills the
blank, and what follows it is scored. Third: which of two texts is likelier, as in BLiMP. Other fields are kept.
"""

import gzip
import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from transmamba.errors import CorpusError

__all__ = ["CHOICE_SUFFIXES", "ChoiceFile", "ChoiceRow", "is_choice_file", "read_choices"]

CHOICE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
BLANK = re.compile(r"(?<!\w)_(?!\w)")

Form = Literal["continuation", "blank", "pair"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceRow:
    """A question: which of `choices` is right, by its index `label`."""

    context: str
    choices: tuple[str, ...]
    label: int

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context up to the blank and each choice in it; for rows with a blank."""
        before, _ = self._around_blank()
        return tuple(before + choice for choice in self.choices)

    @property
    def continuation(self) -> str:
        """What follows the blank; for rows with a blank."""
        return self._around_blank()[1].rstrip()

    def _around_blank(self) -> tuple[str, str]:
        before, after = BLANK.split(self.context)
        return before, after


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceFile:
    """The rows of a file, and which of the three forms they have."""

    path: Path
    form: Form
    rows: tuple[ChoiceRow, ...]

    @property
    def name(self) -> str:
        """The file's name without its endings."""
        return self.path.name.partition(".jsonl")[0]


def is_choice_file(name: str) -> bool:
    """Whether a word names a file of choices rather than a task."""
    return name.endswith(CHOICE_SUFFIXES)


def read_choices(path: Path | str) -> ChoiceFile:
    """Read and check a file of choices: .jsonl, .jsonl.gz or .jsonl.xz.

    In pairs, the good text is the first choice in every other row only, so that a model which holds both for equally
    likely is right half of the time.

    Raises:
        CorpusError: the file is missing, damaged or empty, or a row is not of the form of the first.
    """
    path = Path(path)
    rows: list[ChoiceRow] = []
    is_pair = False
    for number, content in _objects(path):
        if not rows:
            is_pair = {"good", "bad"} <= content.keys()
        where = f"{path}, line {number}"
        rows.append(_pair(where, content, len(rows)) if is_pair else _question(where, content))
    if not rows:
        raise CorpusError(f"{path} holds no rows; {_forms()}")
    has_blanks = all(len(BLANK.findall(row.context)) == 1 and BLANK.split(row.context)[1].strip() for row in rows)
    return ChoiceFile(
        path=path, form="pair" if is_pair else "blank" if has_blanks else "continuation", rows=tuple(rows)
    )


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                content = json.loads(line)
                if not isinstance(content, dict):
                    raise CorpusError(f"{path}, line {number} is not an object; {_forms()}")
                yield number, content
    except FileNotFoundError as error:
        raise CorpusError(
            f"There is no file {path}; --tasks takes names of tasks and paths of .jsonl files."
        ) from error
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path} is not JSON lines: {error}.") from error
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} is truncated or damaged ({error}); copy it anew.") from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _question(where: str, content: dict[str, Any]) -> ChoiceRow:
    missing = [name for name in ("context", "choices", "label") if name not in content]
    if missing:
        raise CorpusError(f"{where} has no {' and no '.join(missing)}; {_forms()}")
    context, choices, label = content["context"], content["choices"], content["label"]
    if not isinstance(context, str):
        raise CorpusError(f"{where}: context is {context!r}; give a text.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(x, str) and x.strip() for x in choices):
        raise CorpusError(f"{where}: choices is {choices!r}; give a list of two texts or more, none of them empty.")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise CorpusError(f"{where}: label is {label!r}; give the index of a choice, 0 to {len(choices) - 1}.")
    return ChoiceRow(context=context, choices=tuple(choices), label=label)


def _pair(where: str, content: dict[str, Any], index: int) -> ChoiceRow:
    good, bad = content.get("good"), content.get("bad")
    if not (isinstance(good, str) and isinstance(bad, str) and good.strip() and bad.strip()):
        raise CorpusError(f"{where}: good is {good!r} and bad is {bad!r}; give two texts, neither of them empty.")
    return ChoiceRow(context="", choices=(bad, good) if index % 2 else (good, bad), label=index % 2)


def _forms() -> str:
    return "a row has context, choices and label (the index of the right choice), or good and bad."
