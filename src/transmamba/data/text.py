"""Text documents out of files, built-in corpora and Hugging Face data sets, split into training and validation."""

import glob
import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from transmamba.data.builtin import load_builtin
from transmamba.errors import CorpusError
from transmamba.progress import progress_bar

__all__ = ["Documents", "TextSource", "load_documents"]

PLAIN_SUFFIXES = (".txt", ".md")
LINES_SUFFIXES = (".jsonl",)
JSON_SUFFIXES = (".json",)
PARQUET_SUFFIXES = (".parquet",)
COMPRESSED_SUFFIXES = (".gz", ".xz")
KNOWN_SUFFIXES = PLAIN_SUFFIXES + LINES_SUFFIXES + JSON_SUFFIXES + PARQUET_SUFFIXES

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?", re.ASCII)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GLOB_SIGNS = "*?["
BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """Where documents come from, and which of them are kept for validation.

    source: one of
        "builtin:python-docs";
        a file, a folder (searched to its depth) or a glob: .txt and .md, one document per file unless
        `document_separator` cuts them; .jsonl, .json (a list of objects) and .parquet, one document per row; each
        but .parquet also as .gz or .xz;
        a Hugging Face data set, "owner/name" or "owner/name:config". What exists on this machine goes first.
    text_field: the field of a row that holds the text.
    split: the split of a Hugging Face data set.
    validation_source: another source of the same form, all of it for validation.
    validation_split: or another split of the same Hugging Face data set.
    validation_share: or this share of the documents; 0 for none. See `load_documents`.
    document_separator: what stands between two documents of a text file, such as "\\n\\n" for a blank line.
    max_documents: read no more than so many of `source`.
    """

    source: str
    text_field: str = "text"
    split: str = "train"
    validation_source: str | None = None
    validation_split: str | None = None
    validation_share: float = 0.05
    document_separator: str | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise CorpusError(
                f"validation_share={self.validation_share} must be at least 0 and less than 1; 0.05 keeps one document "
                "in twenty for validation, 0 none."
            )
        if self.max_documents is not None and self.max_documents < 1:
            raise CorpusError(f"max_documents={self.max_documents} must be at least 1; leave it out to read all.")
        if self.document_separator == "":
            raise CorpusError(
                "document_separator is empty; write the text between two documents, such as a blank line, or leave it "
                "out to have one document per file."
            )
        if self.validation_source is not None and self.validation_split is not None:
            raise CorpusError(
                f"validation_source={self.validation_source!r} and validation_split={self.validation_split!r} exclude "
                "each other; keep one."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """The texts to train on and to validate on; `validation` is empty where none was asked for."""

    train: list[str]
    validation: list[str]


def load_documents(source: TextSource) -> Documents:
    """Read a source and split it.

    Documents of white space only, and null ones, are left out. A document validates if the hash of its text falls into
    the share, so it stays on its side when others are added or removed, and copies of it stay together; if that leaves
    a side empty, one document moves over. A single document is cut at the end of a line instead: its tail validates.

    Raises:
        CorpusError: the source is missing, empty, not UTF-8, malformed or without the text field.
    """
    # Validation goes first: it is the smaller part, and a mistake in its name shows before the larger one is read.
    validation = None
    if source.validation_source is not None:
        validation = _read_all(source.validation_source, source.split, source)
    elif source.validation_split is not None:
        _check_on_hub(source)
        validation = _read_all(source.source, source.validation_split, source)
    documents = _read_all(source.source, source.split, source, source.max_documents)
    if validation is not None:
        return Documents(train=documents, validation=validation)
    if source.validation_share == 0:
        return Documents(train=documents, validation=[])
    if len(documents) == 1:
        return _cut_document(documents[0], source)
    return _split_by_hash(documents, source.validation_share)


def _check_on_hub(source: TextSource) -> None:
    if source.source.startswith("builtin:") or _local_files(source.source):
        raise CorpusError(
            f"validation_split={source.validation_split!r} is for Hugging Face data sets, and {source.source} is none; "
            "use validation_source or validation_share."
        )


def _read_all(name: str, split: str, source: TextSource, max_documents: int | None = None) -> list[str]:
    documents = list(islice(_read(name, split, source), max_documents))
    if not documents:
        raise CorpusError(f"{name} holds no text: every document is empty. Name a source with text in it.")
    return documents


def _split_by_hash(documents: list[str], share: float) -> Documents:
    points = [_hash_point(document) for document in documents]
    validates = [point < share for point in points]
    if not any(validates):
        validates[points.index(min(points))] = True
    if all(validates):
        validates[points.index(max(points))] = False
    return Documents(
        train=[document for document, held in zip(documents, validates, strict=True) if not held],
        validation=[document for document, held in zip(documents, validates, strict=True) if held],
    )


def _hash_point(document: str) -> float:
    """A number in [0, 1) that depends on the text alone, on every machine."""
    digest = hashlib.blake2b(document.encode(), digest_size=6).digest()  # 48 bits: exact in a float
    return int.from_bytes(digest, "big") / 2**48


def _cut_document(document: str, source: TextSource) -> Documents:
    target = round(len(document) * (1 - source.validation_share))
    reach = min(target, len(document) - target) // 2  # a line or word that ends farther off would distort the share
    cut = (
        document.find("\n", target, target + reach) + 1
        or document.rfind("\n", target - reach, target) + 1
        or document.rfind(" ", target - reach, target) + 1
        or target
    )
    train, validation = document[:cut], document[cut:]
    if not train.strip() or not validation.strip():
        raise CorpusError(
            f"{source.source} holds one document of {len(document)} characters, too short to keep "
            f"validation_share={source.validation_share} of it for validation; use more text or validation_share=0."
        )
    return Documents(train=[train], validation=[validation])


def _read(name: str, split: str, source: TextSource) -> Iterator[str]:
    """Every document of one source that is more than white space."""
    if name.startswith("builtin:"):
        documents: Iterator[str] = iter(load_builtin(name))
    elif paths := _local_files(name):
        documents = _read_files(paths, source)
    elif (hub_id := HUB_ID.fullmatch(name)) and not _known_suffix(Path(name)):
        documents = _read_hub(hub_id["name"], hub_id["config"], split, source.text_field)
    else:
        raise CorpusError(
            f"There is no file or folder {name!r}. A text source is a path, a glob, a Hugging Face data set "
            "'owner/name' or 'owner/name:config', or 'builtin:python-docs'."
        )
    yield from (document for document in documents if document.strip())


def _local_files(name: str) -> list[Path]:
    """The files that a path, a folder or a glob stands for, sorted; none if nothing here has that name."""
    path = Path(name).expanduser()
    if path.is_file():
        return [_checked_suffix(path)]
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file() and _known_suffix(file)]
        paths = sorted(
            file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not paths:
            raise CorpusError(f"The folder {name} holds no text; files that end in {_suffix_list()} are read.")
        return paths
    if not any(sign in name for sign in GLOB_SIGNS):
        return []
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    paths = [_checked_suffix(match) for match in matches if match.is_file()]
    if not paths:
        raise CorpusError(f"No file matches {name!r}; check the folder and the pattern.")
    return paths


def _known_suffix(path: Path) -> str | None:
    """The suffix that says how to read a file, that of its compression removed; None if it is not ours to read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED_SUFFIXES
    inner = suffixes[:-1] if compressed else suffixes
    if not inner or inner[-1] not in KNOWN_SUFFIXES or (compressed and inner[-1] in PARQUET_SUFFIXES):
        return None
    return inner[-1]


def _checked_suffix(path: Path) -> Path:
    if _known_suffix(path) is None:
        raise CorpusError(f"{path} is of an unknown kind; files that end in {_suffix_list()} are read.")
    return path


def _suffix_list() -> str:
    return f"{', '.join(KNOWN_SUFFIXES)} (but for .parquet, also with {' or '.join(COMPRESSED_SUFFIXES)})"


def _read_files(paths: Sequence[Path], source: TextSource) -> Iterator[str]:
    with progress_bar("Reading text", total=sum(path.stat().st_size for path in paths)) as advance:
        for path in paths:
            suffix = _known_suffix(path)
            if suffix in PARQUET_SUFFIXES:
                yield from _parquet_documents(path, source.text_field)
                advance(path.stat().st_size)
                continue
            data = _read_bytes(path, advance)
            if suffix in PLAIN_SUFFIXES:
                yield from _plain_documents(path, data, source.document_separator)
            elif suffix in LINES_SUFFIXES:
                yield from _lines_documents(path, data, source.text_field)
            else:
                yield from _json_documents(path, data, source.text_field)


def _read_bytes(path: Path, advance: Callable[[int], None]) -> bytes:
    """The content of a file, decompressed; `advance` counts the bytes that it takes on disk."""
    blocks = []
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as stream:
            done = 0
            while block := stream.read(BLOCK):
                blocks.append(block)
                advance(raw.tell() - done)
                done = raw.tell()
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} is truncated or not a {path.suffix} file ({error}); get it again.") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}.") from error
    return b"".join(blocks)


def _decompressed(path: Path, raw: IO[bytes]) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".xz":
        return lzma.open(raw)
    return gzip.open(raw) if suffix == ".gz" else raw


def _plain_documents(path: Path, data: bytes, separator: str | None) -> Iterator[str]:
    content = data.removeprefix(BYTE_ORDER_MARK).replace(b"\r\n", b"\n")
    # Cut first, decode after: one wide character would make a string of the whole file take four bytes a character.
    for piece in [content] if separator is None else content.split(separator.encode()):
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, data) from error
        yield text if separator is None else text.strip("\n")


def _lines_documents(path: Path, data: bytes, text_field: str) -> Iterator[str]:
    for number, line in enumerate(data.removeprefix(BYTE_ORDER_MARK).split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _row_text(_parse_json(path, data, line, where), text_field, where)


def _json_documents(path: Path, data: bytes, text_field: str) -> Iterator[str]:
    rows = _parse_json(path, data, data.removeprefix(BYTE_ORDER_MARK), str(path))
    if not isinstance(rows, list):
        raise CorpusError(
            f"{path} holds one {_kind(rows)}; a .json file is read as a list of objects. For an object on every line, "
            "name the file .jsonl."
        )
    for number, row in enumerate(rows, start=1):
        yield _row_text(row, text_field, f"{path}, entry {number}")


def _parse_json(path: Path, data: bytes, part: bytes, where: str) -> Any:
    try:
        return json.loads(part.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if b"\n" in part else f"column {error.colno}"
        raise CorpusError(f"{where}: malformed JSON at {place}: {error.msg}.") from error


def _not_utf8(path: Path, data: bytes) -> CorpusError:
    content = "its decompressed content" if path.suffix.lower() in COMPRESSED_SUFFIXES else "the file"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return CorpusError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} of {content}. Convert it, "
            "for example with iconv -f latin1 -t utf-8."
        )
    raise AssertionError(f"{path} is UTF-8 as a whole but not in part")


def _row_text(row: Any, text_field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise CorpusError(f'{where}: expected an object such as {{"{text_field}": "..."}}, not a {_kind(row)}.')
    if text_field not in row:
        raise _no_text_field(where, text_field, row)
    return _checked_text(row[text_field], text_field, where)


def _checked_text(text: Any, text_field: str, where: str) -> str:
    """The text of a row, "" for null."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise CorpusError(
            f"{where}: the field {text_field!r} holds a {_kind(text)}, not text; name another text_field."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where}: character {error.start} of the field {text_field!r} is U+{ord(text[error.start]):04X}, half of "
            "a surrogate pair, which UTF-8 cannot express; remove or replace it."
        ) from error
    return text


def _no_text_field(where: str, text_field: str, fields: Any) -> CorpusError:
    known = ", ".join(sorted(map(str, fields))) or "none"
    return CorpusError(
        f"{where}: there is no field {text_field!r}. Fields there: {known}; set text_field to one of them."
    )


def _kind(value: Any) -> str:
    kinds = {bool: "truth value", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _parquet_documents(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow  # type: ignore[import-untyped]  # it has no stubs
        from pyarrow import parquet
    except ImportError as error:
        raise CorpusError(f"Reading {path} needs the package pyarrow: pip install datasets") from error
    try:
        with parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise _no_text_field(str(path), text_field, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _checked_text(text, text_field, f"{path}, row {row}")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8: {error.reason} in a row after {row}. Convert it.") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(
            f"{path} is truncated or not a .parquet file ({_first_line(error)}); get it again."
        ) from error


def _read_hub(name: str, config: str | None, split: str, text_field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"There is no file or folder {name!r}, and to load a Hugging Face data set of that name needs the package "
            "datasets: pip install datasets"
        ) from error
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        called = f"{name}:{config}" if config else name
        raise CorpusError(
            f"There is no file or folder {called!r}, and no Hugging Face data set of that name with split {split!r} "
            f"could be loaded: {_first_line(error)}"
        ) from error
    if text_field not in dataset.column_names:
        raise _no_text_field(name, text_field, dataset.column_names)
    for row, text in enumerate(dataset[text_field], start=1):
        yield _checked_text(text, text_field, f"{name}, row {row}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
