"""The Python of docs/adaption.md runs: each block by itself, as a reader would copy it."""

import re

import pytest

from tests.helpers import ROOT

PAGE = ROOT / "docs" / "adaption.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_code_of_the_page_runs(number: int) -> None:
    assert "assert" in BLOCKS[number]
    exec(compile(BLOCKS[number], str(PAGE), "exec"), {"__name__": "adaption_page"})
