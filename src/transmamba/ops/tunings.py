"""Launch configurations that were measured, kept as data: what `transmamba bench tune` found on this machine.

An entry names an op, a device, what the configuration depends on, and the configuration. Where there is none, each op
has a rule of its own. Nothing is tried while a model runs, so its first call is like every other.
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from transmamba.errors import InputError

__all__ = ["find_tuning", "forget_tunings", "keep_tuning", "tunings_file"]

FILE_VARIABLE = "TRANSMAMBA_TUNINGS"


def tunings_file() -> Path:
    """Where entries are kept: the file that TRANSMAMBA_TUNINGS names, else one in the user's cache."""
    named = os.environ.get(FILE_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(cache) / "transmamba" / "tunings.json"


def find_tuning(op: str, **sizes: Any) -> dict[str, Any] | None:
    """The configuration measured for these sizes on the current CUDA device, if there is one.

    Raises:
        InputError: the file of entries cannot be read.
    """
    device = _device_name()
    if device is None:
        return None
    wanted = {"op": op, "device": device, **sizes}
    found = (entry for entry in _entries(tunings_file()) if all(entry.get(name) == x for name, x in wanted.items()))
    return next((entry["tuning"] for entry in found), None)


def keep_tuning(op: str, device: str, tuning: dict[str, Any], **sizes: Any) -> Path:
    """Write a configuration down, in the place of one for the same op, device and sizes; return the file."""
    path = tunings_file()
    entry = {"op": op, "device": device, **sizes}
    others = [x for x in _entries(path) if any(x.get(name) != value for name, value in entry.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([*others, {**entry, "tuning": tuning}], indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    forget_tunings()
    return path


def forget_tunings() -> None:
    """Read the file again at the next call."""
    _entries.cache_clear()


@lru_cache(maxsize=4)
def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry["tuning"], dict) for entry in entries):
            raise TypeError("tuning")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read as launch configurations ({type(error).__name__}: {error}); delete it, or run "
            "`transmamba bench tune` again."
        ) from error
    return list(entries)


def _device_name() -> str | None:
    if not torch.cuda.is_available():
        return None
    return _name_of(torch.cuda.current_device())


@lru_cache(maxsize=16)
def _name_of(index: int) -> str:
    return torch.cuda.get_device_name(index)
