"""transmamba distill and transmamba record."""

from pathlib import Path

import pytest

from tests.recipes.distillations import SEQ_LEN, toy_distillation
from transmamba.cli.main import main
from transmamba.inference import load_checkpoint


def flags(folder: Path, *more: str) -> list[str]:
    toy_distillation(folder)
    named = {
        "--student": folder / "student",
        "--data": folder / "corpus.jsonl",
        "--output": folder / "run",
        "--device": "cpu",
    }
    texts = [text for name, value in named.items() for text in (name, str(value))]
    return [*texts, "--set", f"seq_len={SEQ_LEN}", "--set", "batch_size=4", *more]


def test_a_student_is_distilled_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(tmp_path, "--tokens", "5200", "--schedule", "0,4,none", "--set", "logits.ce_weight=0.5")
    assert main(["distill", "--teacher", str(tmp_path / "teacher"), *given]) == 0
    out = capsys.readouterr().out
    assert "stage mixers" in out
    assert "stage logits" in out
    assert "0,4,none" in out
    assert "validation loss" in out
    assert load_checkpoint(tmp_path / "run")[0].config.trans_points == [0, 4, None]


def test_a_teacher_is_recorded_and_learnt_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(tmp_path, "--tokens", "640", "--recipe", "plain_kl")
    stored = str(tmp_path / "stored")
    record = ["record", str(tmp_path / "teacher"), stored, "--data", str(tmp_path / "corpus.jsonl"), "--device", "cpu"]
    assert main([*record, "--set", f"seq_len={SEQ_LEN}", "--set", "k=16", "--tokens", "640"]) == 0
    assert "the 16 most probable of 257 tokens at 640 places, 64 bytes a token" in capsys.readouterr().out
    assert main(["distill", "--teacher", stored, *given]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "mohavk"], "There is no recipe 'mohavk'. Did you mean 'mohawk'?"),
        (["--set", "temperature=2"], "There is no field 'temperature'. Did you mean 'logits.temperature'?"),
        (["--schedule", "v10"], "There is no schedule named 'v10'"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    given = flags(tmp_path, *more)
    capsys.readouterr()
    assert main(["distill", "--teacher", str(tmp_path / "teacher"), *given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
