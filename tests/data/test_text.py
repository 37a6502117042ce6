"""Text sources: what is read, how it is split, what is refused and in which words."""

import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import data_folder
from transmamba.data import Documents, TextSource, load_documents
from transmamba.errors import CorpusError


def read_all(source: Path | str, **fields: Any) -> list[str]:
    """All documents of a source, in order."""
    documents = load_documents(TextSource(source=str(source), validation_share=0, **fields))
    assert documents.validation == []
    return documents.train


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffOne line.\r\nZwölf\u2028 Boxkämpfer.\n\nEnd.\n".encode())
    assert read_all(tmp_path / "a.txt") == ["One line.\nZwölf\u2028 Boxkämpfer.\n\nEnd.\n"]


def test_a_separator_cuts_a_text_file_into_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"One\nof two lines\r\n\r\nTwo\n\n\n\n \n\nThree\n")
    assert read_all(tmp_path / "a.txt", document_separator="\n\n") == ["One\nof two lines", "Two", "Three"]


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_text_is_read_compressed_or_not(tmp_path: Path, suffix: str, compress: Any) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"plain"))
    (tmp_path / f"b.MD{suffix}").write_bytes(compress(b"# heading"))
    (tmp_path / f"c.jsonl{suffix}").write_bytes(
        compress(b'{"text": "x\\u00e9"}\n\n{"n": 1, "text": "y\xe2\x80\xa8"}\n')
    )
    (tmp_path / f"d.json{suffix}").write_bytes(compress(b'[{"text": "first"},\n {"text": null}, {"text": "second"}]'))
    assert read_all(tmp_path) == ["plain", "# heading", "xé", "y\u2028", "first", "second"]


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": ["one", None, "two"], "n": [1, 2, 3]})
    assert read_all(path, text_field="body") == ["one", "two"]


def test_a_folder_is_read_to_its_depth_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    files = {
        "b.txt": "b",
        "sub/a.txt": "sub/a",
        "a.txt": "a",
        "notes.pdf": "pdf",
        ".c.txt": "c",
        "sub/.hidden/d.txt": "d",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_all(tmp_path) == ["a", "b", "sub/a"]


def test_a_glob_takes_the_files_that_match(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b1.txt", "a1.txt", "a2.txt", "sub/a1.txt"):
        (tmp_path / name).write_text(name)
    assert read_all(f"{tmp_path}/a*.txt") == ["a1.txt", "a2.txt"]
    assert read_all(f"{tmp_path}/**/[ab]1.txt") == ["a1.txt", "b1.txt", "sub/a1.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_read(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("brackets")
    assert read_all(tmp_path / "a[1].txt") == ["brackets"]


def test_no_more_than_max_documents_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["one", " ", "two", "three"])
    assert read_all(path, max_documents=2) == ["one", "two"]


def test_the_builtin_corpus_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transmamba.data.text.load_builtin", lambda name: [name, "text"])
    assert read_all("builtin:python-docs") == ["builtin:python-docs", "text"]


def test_every_document_is_on_one_side_in_order(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(2000)]
    documents = load_documents(TextSource(source=str(write_lines(tmp_path / "a.jsonl", texts))))
    assert sorted(documents.train + documents.validation) == sorted(texts)
    assert documents.train == [text for text in texts if text in set(documents.train)]
    assert documents.validation == [text for text in texts if text in set(documents.validation)]
    # Binomial of 2000 and 0.05: mean 100, standard deviation 9.7; five of them on either side.
    assert 51 <= len(documents.validation) <= 149


def test_documents_stay_on_their_side_when_others_come_and_go(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(400)]
    source = TextSource(source=str(write_lines(tmp_path / "a.jsonl", texts)), validation_share=0.2)
    before = load_documents(source)
    write_lines(tmp_path / "a.jsonl", [f"new {number}" for number in range(300)] + texts[::-2])
    after = load_documents(source)
    assert set(after.validation) & set(texts) == set(before.validation) & set(texts[::-2])


def test_copies_of_a_document_are_on_one_side(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(100)]
    documents = load_documents(
        TextSource(source=str(write_lines(tmp_path / "a.jsonl", texts * 2)), validation_share=0.3)
    )
    assert not set(documents.train) & set(documents.validation)


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_neither_side_is_left_empty(tmp_path: Path, share: float, count: int) -> None:
    path = write_lines(tmp_path / "a.jsonl", [f"document {number}" for number in range(count)])
    documents = load_documents(TextSource(source=str(path), validation_share=share))
    assert documents.train
    assert documents.validation
    assert len(documents.train) + len(documents.validation) == count


def test_a_single_document_is_cut_at_the_end_of_a_line(tmp_path: Path) -> None:
    text = "".join(f"This is line {number}.\n" for number in range(1000))
    (tmp_path / "a.txt").write_text(text)
    documents = load_documents(TextSource(source=str(tmp_path / "a.txt"), validation_share=0.1))
    (train,), (validation,) = documents.train, documents.validation
    assert train + validation == text
    assert train.endswith(".\n")
    assert len(validation) / len(text) == pytest.approx(0.1, abs=20 / len(text))  # a line is at most 18 characters


@pytest.mark.parametrize("text", ["ab " * 500, "x" * 1000, "heading\n" + "x" * 2000, "x" * 2000 + "\nend"])
def test_a_document_without_lines_is_cut_near_the_share(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    documents = load_documents(TextSource(source=str(tmp_path / "a.txt"), validation_share=0.2))
    (train,), (validation,) = documents.train, documents.validation
    assert train + validation == text
    assert 0.1 <= len(validation) / len(text) <= 0.3
    assert train.endswith(" ") == (" " in text)


def test_a_single_document_too_short_to_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CorpusError, match=r"one document of 1 characters.*validation_share=0"):
        load_documents(TextSource(source=str(tmp_path / "a.txt")))


def test_another_source_validates(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a.jsonl", ["one", "two", "three"])
    validation = write_lines(tmp_path / "b.jsonl", ["four", "five"])
    source = TextSource(source=str(train), validation_source=str(validation), max_documents=1)
    assert load_documents(source) == Documents(train=["one"], validation=["four", "five"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"validation_share": 1.0}, r"validation_share=1\.0 must be at least 0 and less than 1"),
        ({"validation_share": -0.1}, r"validation_share=-0\.1"),
        ({"validation_share": float("nan")}, r"validation_share=nan"),
        ({"max_documents": 0}, r"max_documents=0 must be at least 1"),
        ({"document_separator": ""}, r"document_separator is empty"),
        ({"validation_source": "b.txt", "validation_split": "test"}, r"exclude each other"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        TextSource(source="a.txt", **fields)


@pytest.mark.parametrize(
    "name", ["no-such-file", "no-such-file.txt", "sub/no-such.jsonl.xz", "/no/such/folder", "a/b/c"]
)
def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=f"There is no file or folder '{name}'"):
        read_all(name)


def test_a_glob_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"No file matches '.*/\*\.txt'"):
        read_all(tmp_path / "*.txt")


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.gz", "a.parquet.gz", "a.txt.zip"])
def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    with pytest.raises(CorpusError, match=r"unknown kind; files that end in \.txt, \.md, \.jsonl, \.json, \.parquet"):
        read_all(tmp_path / name)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="holds no text; files that end in"):
        read_all(tmp_path)


@pytest.mark.parametrize("content", ["", " \n\n \n"])
def test_an_empty_corpus_is_refused(tmp_path: Path, content: str) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(CorpusError, match=rf"{name} holds no text"):
            read_all(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl", "a.json"])
@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_what_is_not_utf8_is_named_with_its_offset(tmp_path: Path, name: str, separator: str | None) -> None:
    content = b'\xef\xbb\xbf{"text": "good"}\r\n\r\n{"text": "caf\xe9"}\n'
    offset = content.index(b"\xe9")
    (tmp_path / name).write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    with pytest.raises(CorpusError, match=rf"{name} is not UTF-8: byte 0xe9 at offset {offset} of .*iconv"):
        read_all(tmp_path / name, document_separator=separator)


@pytest.mark.parametrize("name", ["a.txt.xz", "a.txt.gz"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    compress = lzma.compress if name.endswith("xz") else gzip.compress
    (tmp_path / name).write_bytes(compress(b"text " * 1000)[:-20])
    with pytest.raises(CorpusError, match=rf"{name} is truncated or not a"):
        read_all(tmp_path / name)
    (tmp_path / name).write_bytes(b"not compressed")
    with pytest.raises(CorpusError, match=rf"{name} is truncated or not a"):
        read_all(tmp_path / name)


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one"]})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorpusError, match=r"a\.parquet is truncated or not a \.parquet file"):
        read_all(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3: malformed JSON at column 10"),
        ("a.json", '[{"text": "a"},\n{"text": }]', r"a\.json: malformed JSON at line 2, column 10"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"line 2: expected an object such as .*, not a list"),
        ("a.json", '{"text": "a"}', r"a\.json holds one object; .* name the file \.jsonl"),
        ("a.json", '[{"text": "a"}, "b"]', r"entry 2: expected an object"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"id": 1, "body": "b"}',
            r"line 2: there is no field 'text'.*body, id; set text_field",
        ),
        ("a.jsonl", '{"text": 5}', r"line 1: the field 'text' holds a number, not text"),
        ("a.jsonl", '{"text": "ab\\ud800"}', r"line 1: character 2 of the field 'text' is U\+D800"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=words):
        read_all(tmp_path / name)


def test_a_missing_or_wrong_parquet_column_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": ["one"], "n": [1]})
    with pytest.raises(CorpusError, match=r"no field 'text'\. Fields there: body, n"):
        read_all(path)
    with pytest.raises(CorpusError, match=r"a\.parquet, row 1: the field 'n' holds a number"):
        read_all(path, text_field="n")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """A Hub whose every data set has two rows that name the split; the calls are recorded in the list it gives."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        calls.append((name, config, split))
        return datasets.Dataset.from_dict({"id": [1, 2], "text": [f"{split} one", f"{split} two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_other_names_are_hugging_face_data_sets(hub: list[tuple[str, str | None, str]]) -> None:
    assert read_all("owner/name", split="train[:2]") == ["train[:2] one", "train[:2] two"]
    assert read_all("owner/name-2.0:config_1", max_documents=1) == ["train one"]
    assert hub == [("owner/name", None, "train[:2]"), ("owner/name-2.0", "config_1", "train")]


def test_another_split_of_a_hugging_face_data_set_validates(hub: list[tuple[str, str | None, str]]) -> None:
    documents = load_documents(TextSource(source="owner/name:config", validation_split="test"))
    assert documents == Documents(train=["train one", "train two"], validation=["test one", "test two"])
    assert {call[:2] for call in hub} == {("owner/name", "config")}


def test_a_field_that_a_hugging_face_data_set_lacks_is_named(hub: list[tuple[str, str | None, str]]) -> None:
    with pytest.raises(CorpusError, match=r"owner/name: there is no field 'body'\. Fields there: id, text"):
        read_all("owner/name", text_field="body")


def test_what_is_here_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "a.txt").write_text("local")
    monkeypatch.chdir(tmp_path)
    assert read_all("owner/name") == ["local"]


def test_a_data_set_that_cannot_be_loaded_is_named() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(CorpusError, match="no file or folder 'owner/no-such-set:de', and no Hugging Face data set"):
        read_all("owner/no-such-set:de")


def test_without_datasets_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match="pip install datasets"):
        read_all("owner/name")


def test_a_validation_split_of_a_file_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    for name in (str(path), "builtin:python-docs"):
        with pytest.raises(CorpusError, match="validation_split='test' is for Hugging Face data sets"):
            load_documents(TextSource(source=name, validation_split="test"))


def test_progress_adds_up_to_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    totals: list[int] = []

    @contextmanager
    def record(description: str, total: int) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield done.append

    monkeypatch.setattr("transmamba.data.text.progress_bar", record)
    monkeypatch.setattr("transmamba.data.text.BLOCK", 100)
    noise = bytes(random.randrange(32, 127) for _ in range(5000))
    (tmp_path / "a.txt").write_bytes(noise)
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(noise))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(noise))
    write_parquet(tmp_path / "d.parquet", {"text": ["one"]})
    read_all(tmp_path)
    assert totals == [sum(path.stat().st_size for path in tmp_path.iterdir())] == [sum(done)]
    assert len(done) > 4


@pytest.mark.data
def test_wikipedia_is_cut_into_articles() -> None:
    articles = read_all(data_folder() / "text" / "wiki_en_valid.txt.xz", document_separator="\n\n")
    assert [article.partition("\n")[0] for article in articles[:2]] == ["Visegrád Group", "Endocrinology"]
    assert len(articles) == 285


@pytest.mark.data
def test_novels_are_read_from_json_lines() -> None:
    assert len(read_all(data_folder() / "text" / "novels.jsonl.xz")) == 39
