"""transmamba evaluate."""

import json
import os
from pathlib import Path

import pytest

from tests.training.toy import toy_run
from transmamba.cli.main import main
from transmamba.recipes import train_language_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return train_language_model(toy_run(tmp_path, max_steps=2), device="cpu").folder


def test_a_run_is_scored_on_its_validation_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(folder / "model"), "--device", "cpu", "--json", str(folder / "score.json")]) == 0
    out = capsys.readouterr().out
    for part in ("nats per token", "bits per byte", "by position in the document", "16 to 31"):
        assert part in out
    trained, scored = (json.loads((folder / name).read_text()) for name in ("evaluation.json", "score.json"))
    assert scored["num_tokens"] == trained["num_tokens"]
    assert scored["loss"] == pytest.approx(trained["loss"], rel=1e-5)  # the same in batches of another size
    assert scored["trans_points"] == [0, 8, None]


def test_another_text_and_another_schedule_can_be_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = folder.parent / "other.txt"
    text.write_text("the state space converts memory to the prefix, and then scans on. " * 5)
    losses = []
    for number, schedule in enumerate(("0,8,none", "mamba2")):
        path = folder.parent / f"{number}.json"
        flags = ["--text", str(text), "--trans-points", schedule, "--json", str(path), "--device", "cpu"]
        assert main(["evaluate", str(folder), *flags]) == 0
        content = json.loads(path.read_text())
        losses.append(content["loss"])
        assert content["text"] == str(text)
    assert "TransPoints 0,0,0" in capsys.readouterr().out
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["absent"], "There is no folder absent, and it could not be had as a Hugging Face id"),
        (["./absent"], "There is no ./absent;"),
        (["{folder}", "--text", "absent.txt"], "absent.txt"),
        (["{folder}", "--trans-points", "0,0"], "2"),
        (["{folder}", "--json", "absent/score.json"], "there is no folder absent"),
        (["{folder}", "--device", "tpu"], "device 'tpu' is not"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    capsys.readouterr()
    assert main(["evaluate", *(argument.format(folder=folder) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err


def test_a_truncated_checkpoint_is_said_to_be_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(folder / "model" / "model.safetensors", 1000)
    assert main(["evaluate", str(folder), "--device", "cpu"]) == 2
    assert "model.safetensors is truncated or damaged" in capsys.readouterr().err
