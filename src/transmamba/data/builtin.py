"""Corpora that come with Python: real English that needs no download.

`builtin:python-docs` is the language reference that `help()` shows (`pydoc_data.topics`) and the documentation strings
of the standard library: about two megabytes, a document per topic and per module. Another version of Python has
another text, so losses compare only within one version.
"""

import ast
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from transmamba.errors import CorpusError
from transmamba.progress import progress_bar

__all__ = ["BUILTIN_CORPORA", "PYTHON_DOCS", "load_builtin"]

PYTHON_DOCS = "builtin:python-docs"

SHORTEST_DOCUMENT = 200  # bytes of UTF-8; what is shorter is a heading or a remark, not a text
# Tests and demonstrations are code rather than prose; pydoc_data is read as data; the others are not Python's own.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}
)

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f]")  # escapes that a few documentation strings forgot to quote


def load_builtin(name: str) -> list[str]:
    """The documents of a built-in corpus, in an order that is the same for one version of Python.

    Raises:
        CorpusError: there is no built-in corpus of this name, or this Python comes without its sources.
    """
    if name not in BUILTIN_CORPORA:
        raise CorpusError(f"There is no built-in corpus {name!r}. Known: {', '.join(sorted(BUILTIN_CORPORA))}.")
    return BUILTIN_CORPORA[name]()


def _python_docs() -> list[str]:
    modules = list(_modules())
    if not modules:
        raise CorpusError(
            f"{PYTHON_DOCS} is made of the sources of the standard library, and there are none in "
            f"{sysconfig.get_path('stdlib')}; use a Python that has them, or another corpus."
        )
    return [text for text in [*_topics(), *modules] if len(text.encode()) >= SHORTEST_DOCUMENT]


BUILTIN_CORPORA: dict[str, Callable[[], list[str]]] = {PYTHON_DOCS: _python_docs}


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics  # half a megabyte, needed by this corpus only

    for name in sorted(topics):
        yield topics[name].strip("\n")


def _modules() -> Iterator[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    sources = {
        _module_name(path.relative_to(folder)): path for path in folder.rglob("*.py") if _is_wanted(path, folder)
    }
    with progress_bar("Reading Python's documentation", total=len(sources)) as advance:
        for name in sorted(sources):
            text = _module_document(name, sources[name])
            if text is not None:
                yield text
            advance(1)


def _is_wanted(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return parts[0].removesuffix(".py") in sys.stdlib_module_names and SKIPPED_FOLDERS.isdisjoint(parts)


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_document(name: str, path: Path) -> str | None:
    """The module's name and documentation, then each class and function with a documentation string; None if none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubtful escapes in old modules are no concern of ours
            module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # templates, files for another Python, null bytes
        return None
    parts = list(_documentation(module, prefix=""))
    return "\n\n".join([name, *parts]) if parts else None


def _documentation(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str
) -> Iterator[str]:
    """Documentation strings in the order of the source, each under the line that declares what it describes."""
    if isinstance(node, ast.Module):
        heading = inner = ""
    elif isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        heading = f"class {prefix}{node.name}({bases})\n" if bases else f"class {prefix}{node.name}\n"
        inner = f"{prefix}{node.name}."
    else:
        heading = f"{prefix}{node.name}({ast.unparse(node.args)})\n"
        inner = f"{prefix}{node.name}."
    text = inspect.cleandoc(CONTROL_CHARACTERS.sub("", ast.get_docstring(node, clean=False) or "")).strip()
    if text:
        yield heading + text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documentation(child, inner)
