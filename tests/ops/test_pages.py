"""Every op has a page, and the Python on it runs: each block by itself, as a reader would copy it."""

import re
from pathlib import Path

import pytest

from tests.helpers import ROOT
from transmamba.ops import explain

PAGES = sorted((ROOT / "docs" / "ops").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


SHARED_PAGES = {"post_norm": "residual_norm"}


def test_every_op_has_a_page() -> None:
    assert {SHARED_PAGES.get(choice.op, choice.op) for choice in explain()} <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_the_page_runs(page: Path) -> None:
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    assert all("assert" in block for block in blocks)
    for block in blocks:
        exec(compile(block, str(page), "exec"), {"__name__": page.stem})
