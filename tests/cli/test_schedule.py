"""`transmamba schedule` draws what the library says, and writes nothing when it refuses."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.helpers import ROOT
from transmamba.cli.schedule import schedule
from transmamba.errors import CheckpointError, InputError, RecipeError, ScheduleError
from transmamba.report import format_bytes
from transmamba.schedule import MixerShape, TransPointSchedule

CONFIG = {
    "model_type": "transmamba",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_state_heads": 4,
    "head_dim": 16,
    "vocab_size": 257,
    "conv_kernel": 4,
    "use_gate": True,
    "mixer_form": "shared",
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "trans_points": [0, 16, None],
    "dtype": "bfloat16",
}

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "120")
    app = typer.Typer()
    app.command()(schedule)

    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return tmp_path


def bars(output: str) -> list[str]:
    return re.findall(r"^\d+ +\S+ +([█░]+)", output, flags=re.MULTILINE)


def row(output: str, table: str, name: str) -> list[str]:
    """The cells of the named row of a printed table, units included."""
    lines = output[output.index(table) :].splitlines()
    return next(line for line in lines if line.startswith(name)).removeprefix(name).split()


def test_each_layer_is_drawn_up_to_its_trans_point(run: Run) -> None:
    drawn = bars(run("v9", "--layers", "9"))
    width = len(drawn[0])
    # Seven segments for the eight TransPoints 0, 128, ..., 8192.
    for layer, bar in enumerate(drawn):
        attention = (layer % 8) * width // 7
        assert bar == "█" * attention + "░" * (width - attention)
    assert len(drawn) == 9


def test_positions_stand_above_their_edges(run: Run) -> None:
    lines = run("0,16,64", "--layers", "3", "--seq-len", "256").splitlines()
    header = next(line for line in lines if line.startswith("layer"))
    second = next(line for line in lines if line.startswith("1 "))
    assert header.index(" 16 ") + 1 == second.index("░")


def test_drawings_fit_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, run("v9", "--layers", "8").splitlines())) <= 60


def test_costs_are_those_of_the_library(run: Run, checkpoint: Path) -> None:
    output = run("--config", checkpoint)
    shape = MixerShape.from_config(CONFIG)
    own = TransPointSchedule(CONFIG["trans_points"]).cost(shape, 256)
    transformer = TransPointSchedule([None] * 3).cost(shape, 256)
    lengths = (16, 64, 256, 1024)
    for name, cost in (("this schedule", own), ("Transformer", transformer)):
        expected = " ".join(format_bytes(cost.cache_bytes(length)) for length in lengths)
        assert " ".join(row(output, "Cache of one sequence", name)) == expected
    share = f"{100 * own.total / transformer.total:.0f}"
    assert row(output, "Forward pass", "against Transformer")[:2] == [share, "%"]


def test_layers_that_training_never_switches_are_counted_as_attention(run: Run) -> None:
    output = run("0,256,none", "--layers", "3", "--seq-len", "256")
    assert "Taken as attention at every length: layer 1." in output
    assert row(output, "Cache", "this schedule") == row(
        run("0,none,none", "--layers", "3", "--seq-len", "256"), "Cache", "this schedule"
    )


def test_a_checkpoint_gives_layers_length_and_schedule(run: Run, checkpoint: Path) -> None:
    for path in (checkpoint, checkpoint / "config.json"):
        output = run("--config", path)
        assert "3 layers, 256 tokens" in output
        assert len(bars(output)) == 3
    assert "mamba2, 3 layers, 128 tokens" in run("mamba2", "--config", checkpoint, "--seq-len", "128")


def test_float32_checkpoints_have_larger_caches(run: Run, checkpoint: Path) -> None:
    half = row(run("transformer", "--config", checkpoint), "Cache", "this schedule")
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"dtype": "float32"}), encoding="utf-8")
    full = row(run("transformer", "--config", checkpoint), "Cache", "this schedule")
    assert float(full[0]) == pytest.approx(2 * float(half[0]), rel=0.01)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_figure_is_written(run: Run, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"figure.{suffix}"
    run("v9", "--layers", "8", "--figure", path)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["v10"], ScheduleError, "no schedule named 'v10'"),
        (["0,1", "--layers", "3"], ScheduleError, "2 entries and the model 3 layers"),
        (["v9", "--seq-len", "20"], ScheduleError, "too short for 'v9'"),
        (["v9", "--layers", "0"], InputError, "num_layers=0"),
        (["--figure", "figure.bmp"], RecipeError, r"figure\.bmp must end in one of \.pdf, \.png, \.svg"),
        (["--config", "no/such/folder"], CheckpointError, "There is no"),
    ],
)
def test_bad_requests_are_refused_by_name(run: Run, arguments: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "type None"),
        (json.dumps(CONFIG | {"model_type": "llama"}), "type 'llama'"),
        (json.dumps({name: value for name, value in CONFIG.items() if name != "trans_points"}), "has no trans_points"),
    ],
)
def test_what_is_no_config_of_ours_is_refused(run: Run, checkpoint: Path, text: str, message: str) -> None:
    (checkpoint / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        run("--config", checkpoint)


def test_layers_that_contradict_the_checkpoint_are_refused(run: Run, checkpoint: Path) -> None:
    with pytest.raises(RecipeError, match="--layers 4 contradicts"):
        run("--config", checkpoint, "--layers", "4")


def test_a_refused_request_writes_no_figure(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new" / "figure.png"
    with pytest.raises(ScheduleError):
        run("v10", "--figure", path)
    assert not path.parent.exists()


def test_the_verb_imports_no_torch() -> None:
    # Under the name of the command, the package does not register its models, which needs torch.
    code = (
        "import sys; sys.argv[0] = 'transmamba'; from transmamba.cli.schedule import schedule; "
        "schedule('v9', layers=8); sys.exit(str({'torch', 'transformers'} & set(sys.modules) or ''))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""
    assert "Memory Converter" in result.stdout
