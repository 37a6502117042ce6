"""The public API is what each package's __all__ lists: all of it, sorted, and short at the top."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.test_imports import OPTIONAL

SOURCE = ROOT / "src" / "transmamba"
PACKAGES = sorted({file.parent for file in SOURCE.rglob("*.py")})


def module_name(folder: Path) -> str:
    return ".".join(folder.relative_to(SOURCE.parent).parts)


def public_names(tree: ast.Module) -> Iterator[str]:
    """Yield what an __init__ offers: what it defines, and what it imports from its own files by relative import.

    An absolute import is for the file's own use.
    """
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def sort_key(name: str) -> tuple[bool, bool, str]:
    """Constants, then classes, then the rest: the order that ruff keeps."""
    return not name.isupper(), not name[:1].isupper(), name


@pytest.mark.parametrize("folder", PACKAGES, ids=module_name)
def test_everything_public_is_listed_and_sorted(folder: Path) -> None:
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    package = importlib.import_module(module_name(folder))
    names = set(public_names(tree))
    if not names and "__all__" not in vars(package):
        return  # a package of files that are imported by their own names
    listed = list(package.__all__)
    assert names <= set(listed), f"not in __all__: {sorted(names - set(listed))}"
    assert listed == sorted(set(listed), key=sort_key)
    absent = [name for name in listed if name not in dir(package)]
    assert not absent, f"in __all__ but not in dir(): {absent}"
    assert all(getattr(package, name) is not None for name in listed)


def test_the_top_is_short() -> None:
    top = importlib.import_module("transmamba")
    assert 0 < len(top.__all__) < 20


def test_public_names_are_found() -> None:
    text = "from .a import B as C, _d\nfrom x import y\nE: int = 1\nf = _g = 2\ndef h(): ...\nclass I: ..."
    assert list(public_names(ast.parse(text))) == ["C", "E", "f", "h", "I"]


def test_importing_transmamba_needs_nothing_optional() -> None:
    # None in sys.modules is how Python says that a package is not to be had, to `import` and to find_spec.
    program = (
        f"import sys\nsys.modules.update(dict.fromkeys({sorted(OPTIONAL)}))\n"
        "import transmamba\nprint([n for n in transmamba.__all__ if getattr(transmamba, n)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "src", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "TransMambaForCausalLM" in done.stdout
