"""What a run remembers and shows."""

import importlib.util
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from transmamba.training.progress import (
    EvaluationRow,
    TrainingHistory,
    TrainingProgress,
    TrainingRow,
    tensorboard_callbacks,
)


def training_row(step: int) -> TrainingRow:
    return TrainingRow(
        step=step, tokens=128 * step, seconds=0.5 * step, loss=5.0 / step, learning_rate=1e-3, gradient_norm=1.0
    )


def evaluation_row(step: int) -> EvaluationRow:
    return EvaluationRow(
        step=step, tokens=128 * step, seconds=0.5 * step, validation_loss=5.0, validation_bits_per_byte=2.0
    )


def test_a_history_comes_back_from_its_file(tmp_path: Path) -> None:
    history = TrainingHistory(tmp_path)
    for row in (training_row(1), training_row(2), evaluation_row(2)):
        history.add(row)
    again = TrainingHistory(tmp_path, resume_step=2)
    assert (again.training, again.evaluations) == ([training_row(1), training_row(2)], [evaluation_row(2)])
    assert (again.tokens, again.seconds) == (256, 1.0)


def test_resuming_drops_what_came_after_the_checkpoint_and_a_cut_line(tmp_path: Path) -> None:
    history = TrainingHistory(tmp_path)
    for step in (1, 2, 3):
        history.add(training_row(step))
    with history.path.open("a") as file:
        file.write('{"step": 4, "tok')
    again = TrainingHistory(tmp_path, resume_step=2)
    again.add(training_row(3))
    steps = [json.loads(line)["step"] for line in history.path.read_text().splitlines()]
    assert steps == [row.step for row in again.training] == [1, 2, 3]


def test_a_new_run_forgets_what_lay_in_the_folder(tmp_path: Path) -> None:
    TrainingHistory(tmp_path).add(training_row(1))
    assert TrainingHistory(tmp_path).training == []
    assert (tmp_path / "history.jsonl").read_text() == ""


def play(progress: TrainingProgress, folder: Path) -> None:
    args = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    state, control = TrainerState(max_steps=2, is_world_process_zero=True), TrainerControl()
    progress.on_train_begin(args, state, control)
    for step in (1, 2):
        state.global_step, state.num_input_tokens_seen = step, 128 * step
        progress.on_step_end(args, state, control)
        progress.on_log(args, state, control, logs={"loss": 4.0, "learning_rate": 1e-3, "grad_norm": 0.5})
    progress.on_log(args, state, control, logs={"eval_loss": 3.0, "eval_bits_per_byte": 1.5})
    progress.on_log(args, state, control, logs={"train_runtime": 1.0})
    progress.on_train_end(args, state, control)


def test_without_a_terminal_there_is_a_plain_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = TrainingHistory()
    play(TrainingProgress(history, "toy"), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("toy: step 2/2  loss 4.0000  ")
    assert "tokens/s  lr 1.00e-03  0 s left" in lines[0]
    assert lines[1:] == ["step 2: validation loss 3.0000"]
    assert [(row.step, row.tokens, row.loss, row.gradient_norm) for row in history.training] == [
        (1, 128, 4.0, 0.5),
        (2, 256, 4.0, 0.5),
    ]
    assert [(row.step, row.validation_bits_per_byte) for row in history.evaluations] == [(2, 1.5)]


def test_a_terminal_gets_a_bar_that_is_taken_down(tmp_path: Path) -> None:
    progress = TrainingProgress(TrainingHistory(), "toy")
    progress.console = Console(force_terminal=True, width=120, record=True, stderr=True)
    play(progress, tmp_path)
    shown = progress.console.export_text()
    assert "2/2 steps loss 4.0000" in shown
    assert "tokens/s" in shown
    assert progress.bar is None


def test_without_tensorboard_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transmamba.training.progress.find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, logger="transmamba"):
        assert tensorboard_callbacks(tmp_path) == []
    assert "pip install 'transmamba[tensorboard]'" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_into_the_folder_it_is_given(tmp_path: Path) -> None:
    (callback,) = tensorboard_callbacks(tmp_path / "tensorboard")
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(args, state, control)
    callback.on_log(args, state, control, logs={"loss": 4.0})
    callback.on_train_end(args, state, control)
    assert [path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir()] == [True]
