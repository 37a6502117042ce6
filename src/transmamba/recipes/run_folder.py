"""The folder of a run: its record, and the model at its end."""

import json
import platform
import shlex
import shutil
import sys
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from transmamba._version import __version__
from transmamba.errors import CheckpointError, RecipeError
from transmamba.progress import without_progress_bars
from transmamba.recipes.training_run import TrainingRun
from transmamba.training.checkpoints import mark_complete

__all__ = [
    "EVALUATION_FILE",
    "MODEL_FOLDER",
    "RUN_FILE",
    "check_folder",
    "claim_folder",
    "provenance",
    "read_record",
    "save_model",
]

RUN_FILE = "run.json"
MODEL_FOLDER = "model"
EVALUATION_FILE = "evaluation.json"


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, folder: Path) -> None:
    """Write the model, and its tokenizer if it has one, so that the folder is there in whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        with without_progress_bars():
            model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        mark_complete(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:  # safetensors wraps OSError
        shutil.rmtree(partial, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder} could not be written ({reason}); the checkpoints beside it are whole. Make room on the disk and "
            "resume, which only writes it."
        ) from error


def check_folder(run: TrainingRun, resume: bool, free_to_change: Collection[str]) -> None:
    """Raise RecipeError unless the run's folder is new, or holds this run to be resumed.

    free_to_change: fields that may differ then, because the trained weights do not depend on them.
    """
    folder = Path(run.output)
    record = folder / RUN_FILE
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            way_out = "pass --resume to go on with the run in it, or" if record.is_file() else "give"
            raise RecipeError(f"output={run.output!r} is not an empty folder; {way_out} another --output.")
        return
    if not record.is_file():
        raise RecipeError(f"output={run.output!r} holds no run to resume: there is no {RUN_FILE}; leave out --resume.")
    before, now = read_record(record)["recipe"], run.to_json()
    changed = sorted(name for name in now if name not in free_to_change and before.get(name) != now[name])
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed)
        raise RecipeError(
            f"output={run.output!r} holds another run: {listed}. Resume with the same settings, or give another "
            "--output."
        )


def claim_folder(output: Path, marker: str) -> None:
    """Make the folder of a quickstart, in the place of an earlier one, which holds a file of the marker's name.

    Raises:
        RecipeError: it holds something else.
    """
    if output.exists():
        if not output.is_dir() or (any(output.iterdir()) and not (output / marker).is_file()):
            raise RecipeError(
                f"output={str(output)!r} holds something that is not a quickstart; give another --output."
            )
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / marker).touch()


def read_record(path: Path) -> dict[str, Any]:
    """What a run.json says.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path} is damaged ({error}); it was written by `transmamba train` and should not be edited."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise RecipeError(f"{path} describes no run: it has no recipe.")
    return content


def provenance(device: str) -> dict[str, Any]:
    """With what, and by which command, something was made on a device of this type."""
    packages = ("transformers", "accelerate", "tokenizers", "safetensors", "numpy")
    versions = {"python": platform.python_version(), "transmamba": __version__, "torch": str(torch.__version__)}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": versions | {name: version(name) for name in packages},
        "command": shlex.join(sys.argv),
    }
