"""The built-in corpora."""

import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from transmamba.data import BUILTIN_CORPORA, load_builtin
from transmamba.errors import CorpusError

MODULE = '''"""Parse lines.

This module parses lines, and its documentation is long enough to be a document of its own: it says what a line is,
where a line ends, what happens to a line that does not end, and why nobody has ever complained about any of this.
"""

PATTERN = "\\d"


class Parser(Base, metaclass=Meta):
    """A parser.

    It has:
        an indented line
    """

    def feed(self, line: str, *, strict=False) -> None:
        """Take in a line."""

    def silent(self):
        return 0


async def fetch(url):
    """Get lines\x01 from afar."""
'''


@pytest.fixture(scope="module")
def python_docs() -> list[str]:
    return load_builtin("builtin:python-docs")


@pytest.fixture
def fake_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], None]:
    """Put the standard library into an empty folder, and give a function that writes a file there."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    def write(name: str, content: bytes) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


def test_python_docs_are_megabytes_of_text_without_stubs(python_docs: list[str]) -> None:
    assert 1_500_000 < sum(len(text.encode()) for text in python_docs) < 5_000_000
    assert min(len(text.encode()) for text in python_docs) >= 200
    assert len(python_docs) > 300
    assert not any(re.search(r"[\x00-\x08\x0b-\x1f]", text) for text in python_docs)


def test_modules_and_topics_are_documents(python_docs: list[str]) -> None:
    titles = [text.partition("\n")[0] for text in python_docs]
    assert {"json", "argparse", "collections", "asyncio.queues"} <= set(titles)
    assert 'The "assert" statement' in titles
    assert not any(re.match(r"test\.|idlelib|.*site-packages", title) for title in titles)


def test_a_module_reads_as_its_name_and_what_it_documents(fake_stdlib: Callable[[str, bytes], None]) -> None:
    fake_stdlib("json/decoder.py", MODULE.encode())
    document = load_builtin("builtin:python-docs")[-1]
    assert document.startswith("json.decoder\n\nParse lines.\n\nThis module")
    assert document.endswith(
        "\n\nclass Parser(Base)\nA parser.\n\nIt has:\n    an indented line"
        "\n\nParser.feed(self, line: str, *, strict=False)\nTake in a line."
        "\n\nfetch(url)\nGet lines from afar."
    )


def test_only_the_standard_library_is_read(fake_stdlib: Callable[[str, bytes], None]) -> None:
    skipped = ["site-packages/json.py", "test/json.py", "unittest/test/json.py", "idlelib/run.py", "another.py"]
    for name in [*skipped, "json/__init__.py", "argparse.py"]:
        fake_stdlib(name, MODULE.encode())
    documents = load_builtin("builtin:python-docs")
    assert [text.partition("\n")[0] for text in documents if "Parse lines" in text] == ["argparse", "json"]


def test_the_order_is_that_of_the_names(fake_stdlib: Callable[[str, bytes], None]) -> None:
    names = ["xml/dom/__init__.py", "abc.py", "xml.py", "json/tool.py", "json/__init__.py"]
    for name in names:
        fake_stdlib(name, MODULE.encode())
    documents = load_builtin("builtin:python-docs")
    assert [text.partition("\n")[0] for text in documents[-5:]] == ["abc", "json", "json.tool", "xml", "xml.dom"]
    assert documents == load_builtin("builtin:python-docs")


def test_what_does_not_parse_or_says_little_is_left_out(fake_stdlib: Callable[[str, bytes], None]) -> None:
    fake_stdlib("ast.py", b"def (:")
    fake_stdlib("abc.py", b'"""' + b"null \0 " * 100 + b'"""')
    fake_stdlib("bdb.py", b'"""' + b"latin \xe9 " * 100 + b'"""')
    fake_stdlib("bz2.py", b'"""Too short."""')
    fake_stdlib("cmd.py", b"undocumented = True\n" * 100)
    fake_stdlib("csv.py", b"# coding: latin-1\n" + b'"""' + b"latin \xe9 " * 100 + b'"""')
    titles = [text.partition("\n")[0] for text in load_builtin("builtin:python-docs")]
    assert titles[-1] == "csv"
    assert not {"ast", "abc", "bdb", "bz2", "cmd"} & set(titles)


def test_a_python_without_sources_is_refused(fake_stdlib: Callable[[str, bytes], None]) -> None:
    with pytest.raises(CorpusError, match="sources of the standard library"):
        load_builtin("builtin:python-docs")


def test_an_unknown_corpus_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CorpusError, match=r"'builtin:latin'.*builtin:python-docs"):
        load_builtin("builtin:latin")
    assert list(BUILTIN_CORPORA) == ["builtin:python-docs"]
