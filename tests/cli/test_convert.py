"""transmamba convert."""

import json
from pathlib import Path

import pytest

from tests.conversion.checkpoints import save_source, tiny_source
from transmamba.cli.main import main
from transmamba.inference import load_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_source(tiny_source("Qwen3"), tmp_path / "source")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Every layer has its own TransPoint. " * 100)
    return path


def test_a_checkpoint_is_converted_and_the_difference_printed(
    source: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = source.parent / "out"
    flags = ["--schedule", "0,9,none", "--calibration", str(text), "--device", "cpu"]
    assert main(["convert", str(source), str(out), *flags]) == 0
    printed = capsys.readouterr().out
    assert "fresh (calibrated), TransPoints 0,9,none" in printed
    assert "Largest relative logit difference with every TransPoint at none: " in printed
    assert "on random tokens and text" in printed
    student, _ = load_checkpoint(out)
    assert student.config.trans_points == [0, 9, None]
    assert json.loads((out / "conversion.json").read_text())["max_relative_logit_difference"] < 1e-5


def test_a_named_schedule_is_scaled(source: Path, text: Path) -> None:
    out = source.parent / "out"
    flags = ["--schedule", "v9", "--seq-len", "128", "--initialisation", "local", "--calibration", str(text)]
    assert main(["convert", str(source), str(out), *flags]) == 0
    content = json.loads((out / "conversion.json").read_text())
    assert (content["trans_points"], content["initialisation"]) == ([0, 2, 4], "local")


def test_a_dry_run_prints_the_table_and_writes_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(source.parent.rglob("*"))
    assert main(["convert", str(source), str(source.parent / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "model.layers.1.mixer." in line]
    assert sum("fresh" in line for line in lines) == 6
    q = next(line for line in lines if "q_proj" in line)
    for part in ("copied", "model.layers.1.self_attn.q_proj.weight", "64x32"):
        assert part in q
    assert sorted(source.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{folder}/absent", "out"], "There is no"),
        (["{folder}/source", "{folder}/source"], "holds something already"),
        (["{folder}/source", "out", "--schedule", "0,1"], "2 entries and the model 3 layers"),
        (["{folder}/source", "out", "--seq-len", "1000"], "seq_len=1000 is longer than the source's 128 positions"),
        (["{folder}/source", "out", "--initialisation", "zeros"], "'zeros' is unknown"),
        (["{folder}/source", "out", "--calibration", "absent.txt"], "absent.txt"),
        (["{folder}/source", "out", "--device", "tpu"], "'tpu' is not known"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    source: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(source.parent)
    calibration = [] if "--calibration" in arguments else ["--calibration", str(text)]
    before = sorted(source.parent.rglob("*"))
    assert main(["convert", *(part.format(folder=source.parent) for part in arguments), *calibration]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err
    assert sorted(source.parent.rglob("*")) == before
