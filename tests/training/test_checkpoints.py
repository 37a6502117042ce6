"""Which checkpoints count, and which go."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from transmamba.errors import CheckpointError
from transmamba.training.checkpoints import (
    MANIFEST,
    last_complete_checkpoint,
    mark_complete,
    remove_older_checkpoints,
    why_incomplete,
    write_atomically,
)


def write_checkpoint(folder: Path, step: int, *, complete: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.arange(64.0)}, checkpoint / "model.safetensors")
    torch.save({"step": step}, checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text("{}")
    if complete:
        mark_complete(checkpoint)
    return checkpoint


def test_the_newest_step_counts_not_the_last_in_the_alphabet(tmp_path: Path) -> None:
    for step in (8, 9, 10):
        write_checkpoint(tmp_path, step)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("folder", ["", "absent"])
def test_a_folder_without_checkpoints_has_none(tmp_path: Path, folder: str) -> None:
    assert last_complete_checkpoint(tmp_path / folder) is None


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


DAMAGES = {
    "there is no complete.json": lambda checkpoint: (checkpoint / MANIFEST).unlink(),
    "model.safetensors has 327 bytes and should have 328": truncate,
    "optimizer.pt is missing": lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
    "complete.json cannot be read": lambda checkpoint: (checkpoint / MANIFEST).write_text('{"files": {"mod'),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_an_incomplete_checkpoint_is_passed_over_and_named(
    tmp_path: Path, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, damaged = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    DAMAGES[reason](damaged)
    assert reason in why_incomplete(damaged)
    assert last_complete_checkpoint(tmp_path) == whole
    assert str(damaged) in caplog.text
    assert reason in caplog.text


def test_a_damaged_file_is_never_marked_complete(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1, complete=False)
    truncate(checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was not written in whole"):
        mark_complete(checkpoint)
    assert not (checkpoint / MANIFEST).exists()


def test_older_checkpoints_go_and_incomplete_ones_never_count(tmp_path: Path) -> None:
    for step, complete in ((1, True), (2, True), (3, False), (4, True), (5, False)):
        write_checkpoint(tmp_path, step, complete=complete)
    (tmp_path / "checkpoint-of-mine").mkdir()
    remove_older_checkpoints(tmp_path, keep=2)
    # 3 would count as one of two if it were taken for whole; 5 may be in the making.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-5",
        "checkpoint-of-mine",
    ]


def test_nothing_goes_while_no_checkpoint_is_complete(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, complete=False)
    remove_older_checkpoints(tmp_path, keep=1)
    assert (tmp_path / "checkpoint-1").is_dir()


def test_a_failed_write_leaves_the_old_text_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, json.dumps("new"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
