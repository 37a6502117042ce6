"""transmamba report."""

import json
from pathlib import Path

import pytest

from tests.conversion.checkpoints import save_source, tiny_source
from transmamba.cli.main import main
from transmamba.conversion import convert_checkpoint

SMALL = ["seq_len=64", "eval_tokens=128", "recall_lengths=120", "recall_prompts=2", "recall_choices=2"]
SMALL += ["speed_lengths=16", "speed_repeats=1", "decode_steps=2", "schedules=2"]
FLAGS = [word for setting in SMALL for word in ("--set", setting)]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a teacher, its student and a text."""
    save_source(tiny_source("Qwen3"), tmp_path / "teacher")
    convert_checkpoint(tmp_path / "teacher", tmp_path / "student", schedule=[0, 9, None], initialisation="local")
    (tmp_path / "text.txt").write_text("Every layer has its own TransPoint. " * 60)
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    named = [str(folder / "student"), "--against", str(folder / "teacher"), "--text", str(folder / "text.txt")]
    return ["report", *named, "--device", "cpu", *FLAGS, *more]


def test_a_student_is_reported_on(models: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    assert main(arguments(models, "--output", str(models / "out"))) == 0
    out, err = capsys.readouterr()
    page = models / "out" / "student_report.html"
    for words in ("perplexity", "same next token", "cache at 16", "It costs", f"Report: {page.as_uri()}"):
        assert words in out
    assert err == ""
    assert page.read_text().startswith("<!DOCTYPE html>")
    content = json.loads((models / "out" / "student_report.json").read_text())
    assert content["settings"]["recall_lengths"] == "120"
    assert content["text"] == str(models / "text.txt")


def test_the_default_folder_is_named_for_the_student(models: Path, monkeypatch) -> None:
    monkeypatch.chdir(models)
    little = ["--set", "recall_prompts=0", "--set", "speed_repeats=0", "--set", "schedules=1"]
    assert main(arguments(models, *little)) == 0
    assert (models / "runs" / "student-report" / "student_report.html").is_file()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"student": "absent"}, "There is no"),
        ({"student": "teacher"}, "model of type 'qwen3'"),
        ({"teacher": "absent"}, "There is no"),
        ({"text.txt": "absent.txt"}, "absent.txt"),
    ],
    ids=str,
)
def test_a_wrong_name_is_one_line(
    models: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], line: str
) -> None:
    words = arguments(models, "--output", str(models / "out"))
    ((old, new),) = changes.items()
    words = [str(models / new) if word == str(models / old) else word for word in words]
    assert_one_line(models, capsys, words, line)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--set", "seq_len"], "--set 'seq_len' is not of the form NAME=VALUE"),
        (["--set", "seqlen=3"], "There is no field 'seqlen'. Did you mean 'seq_len'?"),
        (["--set", "seq_len=many"], "seq_len='many' must be a whole number or none."),
        (["--set", "seq_len=1000"], "seq_len=1000 is longer than the 128 positions"),
        (["--device", "tpu"], "device 'tpu' is not"),
        (["--output", "{folder}/text.txt"], "text.txt is a file, not a folder"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(models: Path, capsys: pytest.CaptureFixture[str], more: list[str], line: str) -> None:
    words = [word.format(folder=models) for word in more]
    assert_one_line(models, capsys, arguments(models, "--output", str(models / "out"), *words), line)


def assert_one_line(models: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    capsys.readouterr()
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err
    assert not (models / "out").exists()
