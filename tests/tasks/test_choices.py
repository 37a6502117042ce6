"""Files of choices: three forms, told apart by themselves, and what is said of rows that have none of them."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import data_folder
from transmamba.errors import CorpusError
from transmamba.tasks import ChoiceRow, read_choices
from transmamba.tasks.choices import is_choice_file

QUESTION = {"id": "a", "context": "Water boils at", "choices": ["100 C.", "20 C."], "label": 0}
BLANK = {"context": "Ann helped Bo, so _ was thanked.", "choices": ["Ann", "Bo"], "label": 0}
PAIR = {"good": "Who left?", "bad": "Who leaves did?"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_choices_continue_a_context(tmp_path: Path) -> None:
    file = read_choices(write(tmp_path / "water.jsonl", QUESTION, QUESTION | {"label": 1}))
    assert (file.name, file.form) == ("water", "continuation")
    assert file.rows[1] == ChoiceRow(context="Water boils at", choices=("100 C.", "20 C."), label=1)


def test_a_choice_fills_the_blank_and_what_follows_is_scored(tmp_path: Path) -> None:
    file = read_choices(write(tmp_path / "thanks.jsonl", BLANK, BLANK | {"context": "It was _'s turn. "}))
    assert file.form == "blank"
    assert file.rows[0].contexts == ("Ann helped Bo, so Ann", "Ann helped Bo, so Bo")
    assert [row.continuation for row in file.rows] == [" was thanked.", "'s turn."]


@pytest.mark.parametrize("context", ["no blank", "two _ blanks _", "snake_case", "the blank ends it: _"])
def test_one_row_without_a_blank_in_the_middle_makes_all_of_them_contexts(tmp_path: Path, context: str) -> None:
    file = read_choices(write(tmp_path / "mixed.jsonl", BLANK, BLANK | {"context": context}))
    assert file.form == "continuation"


def test_a_model_that_cannot_tell_texts_apart_is_right_half_of_the_time(tmp_path: Path) -> None:
    file = read_choices(write(tmp_path / "pairs.jsonl", *[PAIR] * 6))
    assert file.form == "pair"
    assert [row.choices[row.label] for row in file.rows] == ["Who left?"] * 6
    first_is_right = [row.label == 0 for row in file.rows]  # what a tie gives
    assert sum(first_is_right) == 3


@pytest.mark.parametrize(("ending", "opener"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_compressed_files_are_read(tmp_path: Path, ending: str, opener: Callable) -> None:
    path = tmp_path / f"water.jsonl{ending}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(json.dumps(QUESTION) + "\n\n")
    assert is_choice_file(str(path))
    assert read_choices(path).name == "water"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"is truncated or damaged .*; copy it anew"):
        read_choices(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "x"}, "line 2 has no choices and no label; a row has context, choices and label"),
        (PAIR, "line 2 has no context and no choices and no label"),
        (QUESTION | {"label": 2}, "label is 2; give the index of a choice, 0 to 1"),
        (QUESTION | {"label": -1}, "label is -1"),
        (QUESTION | {"label": "0"}, "label is '0'"),
        (QUESTION | {"label": True}, "label is True"),
        (QUESTION | {"choices": ["one"]}, r"choices is \['one'\]; give a list of two texts or more"),
        (QUESTION | {"choices": ["one", " "]}, "none of them empty"),
        (QUESTION | {"choices": "ab"}, "choices is 'ab'"),
        (QUESTION | {"context": None}, "context is None; give a text"),
        ([1], "line 2 is not an object"),
    ],
)
def test_a_row_of_another_form_is_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        read_choices(write(tmp_path / "bad.jsonl", QUESTION, row))


def test_a_pair_without_its_bad_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="line 2: good is 'x' and bad is None; give two texts"):
        read_choices(write(tmp_path / "bad.jsonl", PAIR, {"good": "x"}))


def test_files_that_hold_nothing_are_said_to(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"There is no file .*absent\.jsonl"):
        read_choices(tmp_path / "absent.jsonl")
    with pytest.raises(CorpusError, match="holds no rows; a row has context"):
        read_choices(write(tmp_path / "empty.jsonl", *()))
    (tmp_path / "prose.jsonl").write_text("not JSON")
    with pytest.raises(CorpusError, match="is not JSON lines"):
        read_choices(tmp_path / "prose.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match="is truncated or damaged"):
        read_choices(tmp_path / "binary.jsonl")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "form", "count"),
    [
        ("arc_easy_dev.jsonl", "continuation", 1188),
        ("boolq_nopassage_dev.jsonl", "continuation", 1635),
        ("winogrande_dev.jsonl", "blank", 633),
        ("blimp_dev.jsonl.xz", "pair", 33500),
    ],
)
def test_real_sets_are_read(name: str, form: str, count: int) -> None:
    file = read_choices(data_folder() / "lmeval" / name)
    assert (file.form, len(file.rows)) == (form, count)
