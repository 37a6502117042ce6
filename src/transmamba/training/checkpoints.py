"""Checkpoints that can be trusted: one is complete when its manifest says so, and the manifest is written last.

A checkpoint is a folder `checkpoint-<step>`. `complete.json` in it lists every other file with its size. A process that
is killed while it writes leaves a folder without a manifest; a copy that broke off leaves files of other sizes. Neither
is ever resumed from, and older checkpoints go only once a newer one is complete.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from transmamba.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "last_complete_checkpoint",
    "mark_complete",
    "remove_older_checkpoints",
    "why_incomplete",
    "write_atomically",
]

logger = logging.getLogger(__name__)

MANIFEST = "complete.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(?P<step>\d+)", re.ASCII)


def last_complete_checkpoint(folder: Path | str) -> Path | None:
    """The newest complete checkpoint in a run's folder, or None; what is newer but incomplete is named in the log."""
    for _, checkpoint in sorted(_checkpoints(Path(folder)), reverse=True):
        reason = why_incomplete(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is not a whole checkpoint (%s) and is passed over", checkpoint, reason)
    return None


def why_incomplete(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint, in words; None if it is complete."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"there is no {MANIFEST}, so writing it broke off"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes and should have {size:,}"
    return None


def mark_complete(checkpoint: Path) -> None:
    """Check that every file of a folder can be read, force it to disk, and write the manifest, atomically.

    Raises:
        CheckpointError: a file is damaged.
        OSError: the disk is full or fails.
    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in files:
        _check_readable(path)
        _force_to_disk(path)
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_atomically(checkpoint / MANIFEST, json.dumps({"files": sizes}, indent=2) + "\n")
    _force_to_disk(checkpoint.parent)


def remove_older_checkpoints(folder: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and incomplete ones that are older than the newest."""
    complete: list[int] = []
    for step, checkpoint in sorted(_checkpoints(folder), reverse=True):
        if why_incomplete(checkpoint) is None and len(complete) < keep:
            complete.append(step)
        elif complete:
            shutil.rmtree(checkpoint)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there in whole or, at any moment of a crash, as it was before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _force_to_disk(path.parent)


def _checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and path.is_dir():
            yield int(match["step"]), path


def _check_readable(path: Path) -> None:
    """Read what says how long the file must be: the header of safetensors, the directory of torch's zip archives."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} was not written in whole ({error}); look for disk errors.") from error


def _force_to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no handle to force for a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
