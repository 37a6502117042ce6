"""README and docs are true: links lead somewhere, code parses, imports and commands exist, tutorials run."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from tests.helpers import ROOT
from transmamba.cli.main import VERBS, load_verb

DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
TUTORIALS = sorted(DOCS.rglob("tutorial*.md"))

FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)(?: \"[^\"]*\")?\)")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, *languages: str) -> list[str]:
    return [match["code"] for match in FENCE.finditer(text) if match["language"] in languages]


def prose(text: str) -> str:
    """Return the page without code, where brackets are not links and # begins no heading."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Return the names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for match in LINK.finditer(prose(page.read_text(encoding="utf-8"))):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue  # the web is not asked: tests run offline
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            yield f"{match['target']}: there is no such file"
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{match['target']}: there is no such heading"


def commands(text: str) -> Iterator[list[str]]:
    """Yield the command lines of the page's shell blocks, split into words."""
    for code in blocks(text, "bash", "sh", "shell", "console"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)  # a variable set for the command
            if words:
                yield words


def wrong_commands(text: str) -> Iterator[str]:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in commands(text):
        if words[0] == "make":
            wrong = [word for word in words[1:] if "=" not in word and word not in targets]
        elif words[0] == "transmamba":
            wrong = unknown_words(words[1:])
        else:
            wrong = []
        yield from (f"{' '.join(words)}: there is no {word}" for word in wrong)


def unknown_words(arguments: list[str]) -> list[str]:
    flags = {"--help", "-h", "--version", "--debug"}
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if verb is not None:
        if verb not in VERBS:
            return [verb]
        app = typer.Typer(add_completion=False)
        app.command()(load_verb(verb))
        for parameter in typer.main.get_command(app).params:
            flags.update(parameter.opts, parameter.secondary_opts)
    used = [word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)]
    return [flag for flag in used if flag not in flags]


def unknown_imports(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transmamba":
            module = importlib.import_module(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name not in dir(module))


def as_script(text: str) -> str:
    """Return the page's Python blocks and transmamba commands as one program, in the order of the page."""
    program = ["import subprocess, sys"]
    for match in FENCE.finditer(text):
        if match["language"] == "python":
            program.append(match["code"])
        else:
            program += [
                f"subprocess.run([sys.executable, '-m', *{words}], check=True)"
                for words in commands(match[0])
                if words[0] == "transmamba"
            ]
    return "\n".join(program)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken_links(page))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_parses_and_its_imports_exist(page: Path) -> None:
    for code in blocks(page.read_text(encoding="utf-8"), "python", "py"):
        assert not list(unknown_imports(code))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_and_flags_exist(page: Path) -> None:
    assert not list(wrong_commands(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_names_its_language(page: Path) -> None:
    unnamed = [match["code"] for match in FENCE.finditer(page.read_text(encoding="utf-8")) if not match["language"]]
    assert not unnamed, "write ```text above what is neither Python nor a command"


def test_there_is_a_tutorial() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("page", TUTORIALS, ids=page_name)
def test_a_tutorial_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "tutorial.py"
    script.write_text(as_script(page.read_text(encoding="utf-8")), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_broken_page_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading, or two\n[a](#a-heading-or-two) [b](#gone) [c](gone.md) `[d](x)` [e](https://x.org)")
    assert list(broken_links(page)) == ["#gone: there is no such heading", "gone.md: there is no such file"]

    doctor = "A=1 transmamba doctor --device cpu --no-such # why"
    shell = f"```bash\nmake test nothing V=1\n$ {doctor}\ntransmamba fly\nls -x\n```"
    assert [line.rpartition(" ")[2] for line in wrong_commands(shell)] == ["nothing", "--no-such", "fly"]

    code = "from transmamba.errors import InputError, Absent\nfrom elsewhere import anything"
    assert list(unknown_imports(code)) == ["transmamba.errors.Absent"]


def test_a_tutorial_runs_its_commands_in_order() -> None:
    page = "```python\nx = 1\n```\n```bash\ntransmamba doctor\nls\n```\n```python\nassert x\n```\n```text\nno\n```"
    body = as_script(page).splitlines()[1:]
    assert [line for line in body if line] == [
        "x = 1",
        "subprocess.run([sys.executable, '-m', *['transmamba', 'doctor']], check=True)",
        "assert x",
    ]
