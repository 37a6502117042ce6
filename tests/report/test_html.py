"""A page is one file that loads nothing, and text never becomes markup."""

import base64
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from transmamba.errors import InputError
from transmamba.report import Mark, Page

NASTY = "<script>alert('x')</script> & \"quoted\" </figcaption>"
VOID = {"meta", "img"}


class Tree(HTMLParser):
    """Collects text and attributes, and fails on a tag that closes another one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: Page) -> Tree:
    tree = Tree()
    tree.feed(page.render())
    tree.close()
    assert tree.open == []
    return tree


def make_figure() -> Figure:
    figure = Figure()
    figure.add_subplot().plot([1, 2], [3, 4])
    return figure


def make_nasty_page() -> Page:
    page = Page(NASTY, subtitle=NASTY)
    page.finding(NASTY)
    page.points(NASTY, [NASTY])
    page.section(NASTY)
    page.paragraph(NASTY)
    page.code(NASTY)
    page.figure(make_figure(), NASTY)
    page.table([NASTY, "n"], [[NASTY, "1"]], caption=NASTY)
    page.sample([NASTY, Mark(NASTY), NASTY], prompt=NASTY)
    return page


def test_text_is_escaped_everywhere() -> None:
    tree = parse(make_nasty_page())
    assert "script" not in tree.tags
    # title, heading, subtitle, finding, label, point, section, paragraph, code, figure caption,
    # header, cell, table caption, prompt, text, mark, text
    assert tree.text.count(NASTY) == 17
    assert ("alt", NASTY) in tree.attributes


def test_nothing_is_loaded_from_anywhere() -> None:
    html = make_nasty_page().render()
    tree = parse(make_nasty_page())
    assert not {"script", "link", "iframe", "object", "embed"} & set(tree.tags)
    assert not re.search(r"https?://|url\(|@import|//\w", html.replace(NASTY, ""))
    sources = [value for name, value in tree.attributes if name in ("src", "href")]
    assert len(sources) == 1
    assert all(source is not None and source.startswith("data:image/svg+xml;base64,") for source in sources)


def test_a_figure_is_embedded_as_a_drawing_that_loads_nothing() -> None:
    page = Page("t")
    page.figure(make_figure(), "caption", alt="what it shows")
    tree = parse(page)
    source = dict(tree.attributes)["src"]
    assert source is not None
    svg = base64.b64decode(source.split(",", 1)[1]).decode()
    assert svg.rstrip().endswith("</svg>")
    assert not re.search(r"(href|src)=\"(?!#)", svg)
    assert ("alt", "what it shows") in tree.attributes


def test_the_same_page_is_the_same_bytes() -> None:
    assert make_nasty_page().render() == make_nasty_page().render()


def test_marks_stand_between_their_pieces() -> None:
    page = Page("t")
    page.sample(["one", Mark("here"), "two\nlines"], prompt="start ")
    assert "start onehere" + "two\nlines" in parse(page).text
    assert '<span class="mark">here</span>two\nlines' in page.render()


def test_control_characters_of_a_sample_are_made_visible() -> None:
    page = Page("t")
    page.sample(["a\x00b\x1bc\td\r"])
    assert "a\u2400b\u241bc\td\u240d" in page.render()


def test_tables_have_a_cell_for_each_value() -> None:
    page = Page("t")
    page.table(["name", "x", "y"], [["a", "1", "2"], ["b", "3", "4"]], strong_rows=[1])
    html = page.render()
    assert html.count("<th") - html.count("<thead") == 3
    assert html.count('<td class="number">') == 4
    assert '<tr class="strong"><td>b</td>' in html


def test_empty_headers_are_not_shown() -> None:
    page = Page("t")
    page.table(["", ""], [["a", "1"]])
    assert "<thead>" not in page.render()


def test_points_stand_under_their_label() -> None:
    page = Page("t")
    page.points("Kept", ["one.", "12 %."])
    assert "<p>Kept</p><ul><li>one.</li><li>12&nbsp;%.</li></ul>" in page.render()


def test_only_wide_tables_scroll_on_a_phone() -> None:
    for columns, narrow in ((4, True), (5, False)):
        page = Page("t")
        page.table(["n"] * columns, [["1"] * columns])
        assert ('<table class="narrow">' in page.render()) is narrow


def test_a_row_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(InputError, match="Row 1 of the table has 1 cells and the header 2"):
        Page("t").table(["a", "b"], [["1", "2"], ["3"]])


def test_numbers_stay_with_their_units() -> None:
    page = Page("t")
    page.finding("It takes 13 % or 6.58 MB in 12 s, and 5 models more.")
    assert "13&nbsp;% or 6.58&nbsp;MB in 12&nbsp;s, and 5 models" in page.render()


def test_writing_makes_the_folder_and_a_readable_file(tmp_path: Path) -> None:
    page = make_nasty_page()
    path = page.write(tmp_path / "new" / "folder" / "page.html")
    assert path.read_text(encoding="utf-8") == page.render()
    assert path.stat().st_mode & stat.S_IRUSR
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_a_failed_write_leaves_the_older_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Page("older").write(tmp_path / "page.html")

    def fail(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        Page("newer").write(path)
    assert "older" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
