"""One web page in one file: nothing is loaded from anywhere, so it can be mailed, archived and printed.

A `Page` is filled from top to bottom and then written. Everything given as text is escaped. Figures are embedded as
SVG, tables scroll sideways on a phone. Every report of the library is such a page; what it says is in its own file.
"""

import base64
import io
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from transmamba.errors import InputError

STYLE = """
:root { color-scheme: light; --ink: #1d2129; --soft: #5d6470; --line: #e1e4e8; --mark: #b8317f; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 48rem; padding: 2.5rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .6rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line); }
p { margin: .7rem 0; }
.subtitle { color: var(--soft); margin: 0 0 1.6rem; }
.finding { font-size: 1.15rem; line-height: 1.55; margin: .6rem 0; }
.points { display: grid; grid-template-columns: 7rem 1fr; gap: 0 1rem; padding: .7rem 0;
  border-top: 1px solid var(--line); }
.points p { margin: 0; font-weight: 600; }
.points ul { margin: 0; padding: 0; list-style: none; }
.points li + li { margin-top: .45rem; }
figure { margin: 1.6rem 0 2rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption, caption, .note { color: var(--soft); font-size: .92rem; line-height: 1.5; }
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .6rem; }
caption span { display: block; position: sticky; left: 0; max-width: calc(100vw - 2.5rem); }
th, td { padding: .42rem .75rem .42rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
th.number, td.number { text-align: right; padding: .42rem 0 .42rem .75rem; }
td.number, td:first-child { white-space: nowrap; }
tr.strong td { font-weight: 600; }
.sample { margin: 1.2rem 0; padding: 1rem 1.1rem; border: 1px solid var(--line); border-radius: 6px;
  background: #fafbfc; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: .86rem; }
.sample .prompt { color: var(--soft); }
.sample .mark { display: inline-block; padding: 0 .5em; margin: 0 .15em; border-radius: 3px; background: var(--mark);
  color: #fff; font: 600 .78rem/1.55 system-ui, sans-serif; white-space: nowrap; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .88em; }
pre { overflow-x: auto; padding: .8rem 1rem; background: #fafbfc; border: 1px solid var(--line); border-radius: 6px; }
@media (max-width: 34rem) {
  body { padding-top: 1.5rem; font-size: 1rem; }
  h1 { font-size: 1.55rem; }
  .scroll table:not(.narrow) { min-width: 30rem; }
  .narrow td:first-child { white-space: normal; }
  .points { display: block; }
  .points ul { margin-top: .2rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  .sample .mark { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


NARROW_COLUMNS = 4  # that a phone shows side by side; wider tables scroll


@dataclass(frozen=True, slots=True)
class Mark:
    """A label that stands within the text of a sample."""

    label: str


class Page:
    """A page under construction; `render` gives the HTML and `write` the file."""

    def __init__(self, title: str, *, subtitle: str = "") -> None:
        self.title = title
        self._blocks = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self._blocks.append(f'<p class="subtitle">{escape(subtitle)}</p>')

    def finding(self, text: str) -> None:
        """A sentence in large type: what the reader came for."""
        self._blocks.append(f'<p class="finding">{_prose(text)}</p>')

    def points(self, label: str, sentences: Sequence[str]) -> None:
        """A few sentences under a label, each a point of its own."""
        items = "".join(f"<li>{_prose(sentence)}</li>" for sentence in sentences)
        self._blocks.append(f'<div class="points"><p>{escape(label)}</p><ul>{items}</ul></div>')

    def section(self, title: str) -> None:
        """A heading; what follows belongs to it."""
        self._blocks.append(f"<h2>{escape(title)}</h2>")

    def paragraph(self, text: str) -> None:
        self._blocks.append(f"<p>{_prose(text)}</p>")

    def code(self, text: str) -> None:
        """Lines kept as they are, such as a command."""
        self._blocks.append(f"<pre>{escape(text)}</pre>")

    def figure(self, figure: Figure, caption: str, *, alt: str | None = None) -> None:
        """A figure with its caption below; `alt` is read to those who cannot see it and is the caption unless given."""
        source = base64.b64encode(_svg(figure)).decode("ascii")
        self._blocks.append(
            f'<figure><img alt="{escape(alt or caption)}" src="data:image/svg+xml;base64,{source}">'
            f"<figcaption>{_prose(caption)}</figcaption></figure>"
        )

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        caption: str = "",
        text_columns: int = 1,
        strong_rows: Sequence[int] = (),
    ) -> None:
        """A table of ready-made texts; the first `text_columns` columns are set left, the others right as numbers.

        Headers that are all empty are not shown.
        """
        for index, row in enumerate(rows):
            if len(row) != len(headers):
                raise InputError(f"Row {index} of the table has {len(row)} cells and the header {len(headers)}.")
        kinds = ["" if column < text_columns else ' class="number"' for column in range(len(headers))]
        head = "".join(f"<th{kind}>{escape(cell)}</th>" for kind, cell in zip(kinds, headers, strict=True))
        head = f"<thead><tr>{head}</tr></thead>" if any(headers) else ""
        body = []
        for index, row in enumerate(rows):
            cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
            strong = ' class="strong"' if index in strong_rows else ""
            body.append(f"<tr{strong}>{cells}</tr>")
        title = f"<caption><span>{_prose(caption)}</span></caption>" if caption else ""
        lines = "".join(body)
        narrow = ' class="narrow"' if len(headers) <= NARROW_COLUMNS else ""
        self._blocks.append(f'<div class="scroll"><table{narrow}>{title}{head}<tbody>{lines}</tbody></table></div>')

    def sample(self, pieces: Sequence[str | Mark], *, prompt: str = "") -> None:
        """Generated text after its prompt, line breaks kept; a `Mark` among the pieces is shown as a label there."""
        parts = [f'<span class="prompt">{escape(_visible(prompt))}</span>'] if prompt else []
        for piece in pieces:
            if isinstance(piece, Mark):
                parts.append(f'<span class="mark">{escape(piece.label)}</span>')
            else:
                parts.append(escape(_visible(piece)))
        self._blocks.append(f'<div class="sample">{"".join(parts)}</div>')

    def render(self) -> str:
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(self._blocks)
            + "\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page, replacing an older one only once the new one is complete."""
        return write_text(path, self.render())


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 file whole or not at all, making its folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        # mkstemp makes files that only their owner can read.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _svg(figure: Figure) -> bytes:
    """The figure as SVG with letters as outlines, the same bytes every time."""
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "transmamba"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def _prose(text: str) -> str:
    """Escaped text in which no line breaks between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(?:%|[kMGTPE]?B|[kMGTPE]|s|min|h)(?!\w))", "&nbsp;", escape(text))


def _visible(text: str) -> str:
    """Control characters, which a byte-level model may write and HTML forbids, as the symbols that stand for them."""
    return "".join(
        chr(0x2400 + ord(character)) if ord(character) < 32 and character not in "\n\t" else character
        for character in text
    )
