"""Weights out of a file of torch.save or safetensors, without running code of the file's."""

import argparse
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from transmamba.errors import CheckpointError

USUAL_KEYS = ("model", "state_dict", "module")
WRAPPERS = ("module.",)  # of data-parallel training


_NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # how NumPy unpickles a number

# Plain data of the published training scripts, in classes that unpickling would otherwise refuse: their arguments,
# and best accuracies as NumPy's numbers, which older releases of NumPy kept in another module.
HARMLESS: list[Any] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    _NUMPY_SCALAR,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
]


def read_weights(path: Path, key: str | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Raises:
        CheckpointError: there is none, it is damaged, or it holds more than tensors and plain data.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; give the .pth or .safetensors of a published checkpoint.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read ({error}); copy it anew.") from error
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = ", ".join(_unsafe(path)) or "something that is no tensor"
        raise CheckpointError(
            f"{path} holds {unsafe} beside its weights, or is damaged; save the weights alone with "
            "torch.save(state_dict, path), or copy it anew."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); copy it anew.") from error
    return _tensors(path, content, key)


def _unsafe(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return []


def _tensors(path: Path, content: Any, key: str | None) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a checkpoint is a dictionary of tensors.")
    if key is not None and not isinstance(content.get(key), Mapping):
        listed = ", ".join(str(name) for name, value in content.items() if isinstance(value, Mapping))
        raise CheckpointError(f"{path} has no entry {key!r} with weights; its dictionaries are {listed or 'none'}.")
    keys = (key,) if key is not None else USUAL_KEYS
    found = next((content[name] for name in keys if isinstance(content.get(name), Mapping)), content)
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; its entries are {', '.join(map(str, list(found)[:5]))}.")
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors
