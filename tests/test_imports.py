"""Imports point one way, triton stays in ops, and what is optional is imported where it is used."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

SOURCE = ROOT / "src" / "transmamba"

# A room may import the rooms of earlier lines, and itself; rooms of one line do not know each other.
ORDER = [
    {"_version", "errors", "memory", "progress"},
    {"compatibility", "schedule", "weights"},
    {"ops"},
    {"modules"},
    {"models"},
    {"conversion", "data", "distillation", "inference", "report", "tasks"},
    {"benchmarking", "training"},
    {"recipes"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Tighter than the order: data reads text and knows no model; a report is asked for by a recipe or a command.
ONLY_IMPORTS = {"data": {"data", "errors", "progress"}}
ONLY_IMPORTED_BY = {"report": {"report", "recipes", "cli"}, "recipes": {"recipes", "cli"}}

# What may be absent where transmamba is imported. Inside a function, its absence can be explained.
OPTIONAL = {
    *("av", "datasets", "fla", "kornia", "lm_eval", "mamba_ssm", "peft", "sklearn"),
    *("tensorboard", "timm", "torchcodec", "torchvision", "triton"),
}


def offences(source: Path) -> Iterator[str]:
    """Yield `file:line: what is wrong` for every import in the package at `source` that breaks the rules above."""
    for file in sorted(source.rglob("*.py")):
        path = file.relative_to(source)
        room = path.parts[0].removesuffix(".py")
        if room == "__init__":
            room = "__main__"  # the public page may name every room
        tree = ast.parse(file.read_text(encoding="utf-8"))
        run_at_import = set(statements_run_at_import(tree))
        for node in ast.walk(tree):
            for module in imported_modules(node, path):
                problem = room_offence(room, module) or package_offence(path, module, node in run_at_import)
                if problem:
                    yield f"src/transmamba/{path}:{node.lineno}: {problem}"


def room_offence(room: str, module: str) -> str:
    names = module.split(".")
    if names[0] != "transmamba":
        return ""
    if len(names) == 1:
        return "imports from the top of transmamba; name the room"
    other = names[1]
    if room not in RANK or other not in RANK:
        unknown = other if room in RANK else room
        return f"{unknown} has no place in the order of rooms; give it one in tests/test_imports.py"
    if room == other:
        return ""
    if (
        RANK[other] >= RANK[room]
        or other not in ONLY_IMPORTS.get(room, RANK)
        or room not in ONLY_IMPORTED_BY.get(other, RANK)
    ):
        return f"{room} imports {other}"
    return ""


def package_offence(path: Path, module: str, run_at_import: bool) -> str:
    package = module.split(".")[0]
    if package == "triton":
        return "" if path.parts[0] == "ops" else "only ops imports triton"
    if package in OPTIONAL and run_at_import:
        return f"imports {package} with the module; import it inside the function that needs it"
    return ""


def imported_modules(node: ast.AST, path: Path) -> Iterator[str]:
    """Yield the absolute names of what an import statement of the file imports; `transmamba.room` at the least."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ["transmamba", *path.parent.parts]
        start = base[: len(base) - node.level + 1] if node.level else []
        module = ".".join([*start, *([node.module] if node.module else [])])
        if module == "transmamba":
            yield from (f"transmamba.{alias.name}" if alias.name in RANK else "transmamba" for alias in node.names)
        else:
            yield module


def statements_run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that importing the module runs: not the bodies of functions, nor those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from statements_run_at_import(node)


def test_imports_point_one_way() -> None:
    found = list(offences(SOURCE))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("ops/scan.py", "from transmamba.modules import norm", "ops imports modules"),
        ("ops/scan.py", "from ..modules.norm import RMSNorm", "ops imports modules"),
        ("ops/deep/scan.py", "from ...models import language", "ops imports models"),
        ("ops/scan.py", "def f():\n    import transmamba.cli.main", "ops imports cli"),
        ("data/text.py", "from transmamba.ops import ssd_scan", "data imports ops"),
        ("tasks/language.py", "from transmamba.data import packing", "tasks imports data"),
        ("training/loop.py", "from transmamba.report import html", "training imports report"),
        ("cli/train.py", "from transmamba import TransMambaConfig", "name the room"),
        ("cli/train.py", "from transmamba.novel import thing", "novel has no place"),
        ("novel/thing.py", "from transmamba.errors import InputError", "novel has no place"),
        ("modules/mixer.py", "def f():\n    import triton.language as tl", "only ops imports triton"),
        ("data/text.py", "import datasets", "imports datasets with the module"),
        ("data/text.py", "if True:\n    from torchvision import io", "imports torchvision with the module"),
    ],
)
def test_each_offence_is_seen(tmp_path: Path, file: str, line: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line)
    (found,) = offences(tmp_path)
    assert found.startswith(f"src/transmamba/{file}:")
    assert message in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cli/train.py", "from transmamba.recipes import base\nfrom . import _errors"),
        (
            "ops/scan/__init__.py",
            "from .reference import scan\nfrom ..checks import check\nfrom transmamba import errors",
        ),
        ("ops/scan/triton.py", "import triton"),
        ("data/text.py", "def f():\n    import datasets"),
        ("data/text.py", "if TYPE_CHECKING:\n    import datasets"),
        ("__init__.py", "from transmamba.models import language"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, file: str, line: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(line)
    assert not list(offences(tmp_path))
