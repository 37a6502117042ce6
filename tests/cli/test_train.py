"""transmamba train."""

import json
from pathlib import Path

import pytest

from tests.training.toy import toy_run, write_corpus
from transmamba.cli.main import main


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """The toy run as a recipe in a file, on no particular corpus."""
    settings = {**toy_run(tmp_path).to_json(), "max_steps": 3, "output": ""}
    file = tmp_path / "recipes.py"
    file.write_text(
        "from transmamba.recipes import LanguageModelRun\n\n"
        f"def toy():\n    return LanguageModelRun.from_json({settings!r})\n"
    )
    return f"{file}:toy"


def test_a_recipe_is_trained_and_summed_up(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "elsewhere").mkdir()
    text = write_corpus(tmp_path / "elsewhere")
    folder = tmp_path / "out"
    arguments = ["train", recipe, "--text", str(text), "--tokenizer", "train:300", "--output", str(folder)]
    arguments += ["--device", "cpu", "--set", "learning_rate=1e-2", "--set", "model.conv_kernel=0"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    for part in ("parameters", "0,8,none", "3 steps, 384 tokens", "tokens/s", "bits per byte", str(folder / "model")):
        assert part in out
    assert "Traceback" not in err
    record = json.loads((folder / "run.json").read_text())
    assert record["recipe"]["text"]["source"] == str(text)
    assert record["recipe"]["learning_rate"] == 1e-2
    assert (record["model"]["conv_kernel"], record["model"]["vocab_size"]) == (0, 300)

    assert main(arguments) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert "resuming" in capsys.readouterr().err


def test_a_llama_is_trained_too(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    arguments = ["train", recipe, "--output", str(tmp_path / "out"), "--device", "cpu", "--set", "schedule=transformer"]
    assert main([*arguments, "--set", "model.architecture=llama"]) == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out
    assert "TransPoints" not in out
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--set", "learning_rate"], "--set 'learning_rate' is not of the form NAME=VALUE"),
        (["--set", "=3"], "--set '=3' is not of the form NAME=VALUE"),
        (["--set", "learningrate=1"], "There is no field 'learningrate'. Did you mean 'learning_rate'? Known: "),
        (["--set", "batch_size=many"], "batch_size='many' must be a whole number."),
        (["--set", "batch_size=0"], "batch_size=0 must be at least 1."),
        (["--set", "epochs=1"], "Give exactly one of max_steps, max_tokens and epochs"),
        (["--set", "model.hidden_size=33"], "must divide hidden_size=33"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--device", "tpu"], "device 'tpu' is not"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_before_any_work(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", recipe, "--output", str(tmp_path / "out"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert line in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_recipe_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "python_docs"]) == 2
    assert "There is no recipe 'python_docs'." in (err := capsys.readouterr().err)
    assert "wiki_v9_36m_h200" in err
