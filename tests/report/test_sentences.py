"""The page of an adapted sentence encoder."""

from dataclasses import replace
from pathlib import Path

from transmamba.report import SentenceReport

REPORT = SentenceReport(
    name="adapt_sentences",
    teacher="minilm",
    student="bimamba2",
    source="wiki.txt",
    num_training_texts=12_000,
    num_parameters=23_500_000,
    share_from_teacher=0.95,
    cosine=0.961,
    scores=((0.787, 0.961, 0.986, 1.7), (0.75, 0.94, 0.97, 2.06)),
    num_photos=100,
    cka=[[0.9, 0.4], [0.3, 0.8]],
    steps=[1, 2],
    losses=[0.6, 0.5],
    layer_weights=[[1.0, 1.1], [1.0, 0.9]],
    layer_cosines=[[0.1, 0.2], [0.3, 0.4]],
    distances=[(2, 0.05)],
)


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    REPORT.page().write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for text in ("0.961", "78.7 %", "75.0 %", "2.06", "among 100", "12,000 texts", "0.0500"):
        assert text in page, text
    assert page.count("<figure") == 4


def test_without_captions_and_layers_there_is_no_table(tmp_path: Path) -> None:
    bare = replace(REPORT, scores=None, cosine=None, layer_weights=[], layer_cosines=[], distances=[])
    bare.page().write(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "recall at 1" not in page
    assert page.count("<figure") == 2
