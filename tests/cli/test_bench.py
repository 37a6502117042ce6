"""`transmamba bench`: a table, a JSON file and a figure; code 1 where something is wrong, 2 for a mistake."""

import json
from pathlib import Path

import pytest

from transmamba.benchmarking import ops
from transmamba.cli.main import main

OPS = ["--set", "shapes=2x40x2x16", "--set", "hybrid=1x64x2x16", "--set", "points=0,16", "--set", "seconds=0.01"]
MODEL = [
    *("--set", "layers=8", "--set", "hidden_size=32", "--set", "intermediate_size=48", "--set", "heads=2"),
    *("--set", "vocab_size=64", "--set", "seq_len=64"),
]


def run(tmp_path: Path, what: str, *arguments: str) -> tuple[int, list[Path]]:
    code = main(["bench", what, "--device", "cpu", "--output", str(tmp_path), *arguments])
    return code, sorted(tmp_path.glob(f"{what}_*"))


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("ops", OPS),
        ("model", [*MODEL, "--set", "prefill=32", "--set", "seconds=0.01"]),
        ("decode", [*MODEL, "--set", "context=32", "--set", "steps=4", "--set", "batches=1"]),
    ],
)
def test_every_benchmark_writes_numbers_and_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, arguments: list[str]
) -> None:
    code, files = run(tmp_path, what, *arguments)
    out = capsys.readouterr().out
    assert code == 0, out
    numbers, figure = files
    content = json.loads(numbers.read_text(encoding="utf-8"))
    assert content["provenance"]["versions"]["torch"]
    assert content["failures"] == []
    assert figure.suffix == ".svg"
    assert str(numbers) in out.replace("\n", "")


def test_a_wrong_op_is_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "BOUNDS", dict.fromkeys(ops.BOUNDS, 0.0))
    code, files = run(tmp_path, "ops", *OPS)
    assert code == 1
    assert "Wrong: " in capsys.readouterr().out
    assert json.loads(files[0].read_text(encoding="utf-8"))["rows"] == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["ops", "--set", "shape=1"], "Did you mean 'shapes'"),
        (["ops", "--set", "shapes=8x8"], "such as 32x2048x16x128"),
        (["model", "--set", "schedules=v99"], "v99"),
        (["speed"], "speed"),
        (["ops", "--device", "quantum"], "quantum"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert main(["bench", *arguments, "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
