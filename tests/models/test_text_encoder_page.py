"""The page on text encoders: its first block runs."""

from tests.helpers import ROOT
from tests.test_docs import blocks


def test_the_model_on_the_page_runs() -> None:
    page = (ROOT / "docs" / "text_encoders.md").read_text(encoding="utf-8")
    code = blocks(page, "python")[0]
    assert "output_directions=True" in code
    exec(compile(code, "docs/text_encoders.md", "exec"), {})
