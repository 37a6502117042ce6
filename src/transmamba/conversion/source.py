"""What is converted: a folder, a Hugging Face id or a model in memory, read one tensor at a time.

Only safetensors are read and no code of a checkpoint runs.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from transmamba.errors import CheckpointError, InputError

from .sources import Family, find_family

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that can be read. folder: None for a model in memory. dtype: that of most of its weights."""

    name: str
    config: PreTrainedConfig
    family: Family
    folder: Path | None
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    read: Callable[[str], Tensor]

    @property
    def prefix(self) -> str:
        """What the names of the backbone's tensors begin with."""
        return self.family.prefix if any(name.startswith(self.family.prefix) for name in self.shapes) else ""

    def is_tied(self, embedding: str) -> bool:
        """Whether the head is the embedding: the config says so, and no head of its own is stored."""
        if not self.config.tie_word_embeddings:
            return False
        if HEAD not in self.shapes or embedding not in self.shapes:
            return True
        return self.shapes[HEAD] == self.shapes[embedding] and torch.equal(self.read(HEAD), self.read(embedding))


def open_source(source: str | Path | PreTrainedModel) -> Source:
    """Open a folder, a Hugging Face id (downloaded unless it is in the cache), or a model in memory.

    Raises:
        CheckpointError: there is none, it is incomplete, or of a family that cannot be converted.
    """
    if isinstance(source, PreTrainedModel):
        return _from_model(source)
    folder = find_folder(source)
    content = _read_json(folder / "config.json")
    family = find_family(str(source), content.get("model_type"))
    if content.get("quantization_config"):
        raise CheckpointError(f"{source} is quantized; convert the checkpoint that it was made from.")
    config = _read_config(folder, family)
    files, shapes, kinds = _read_headers(folder)
    return Source(
        name=str(source),
        config=config,
        family=family,
        folder=folder,
        shapes=shapes,
        dtype=_commonest_dtype(str(source), shapes, kinds),
        read=lambda name: _read_tensor(files[name], name),
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer beside the model."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def find_folder(source: str | Path) -> Path:
    """The local folder of a checkpoint; a Hugging Face id is downloaded first, unless it is in the cache."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{source} is a file; give the folder of a checkpoint that holds config.json and safetensors."
        )
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)):
        raise CheckpointError(f"There is no {source}; give the folder of a checkpoint, or a Hugging Face id.")
    return _download(str(source))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"There is no folder {name}, and it could not be had as a Hugging Face id ({type(error).__name__}); check "
            "the name, the network, and for gated models `hf auth login`."
        ) from error


def _from_model(model: PreTrainedModel) -> Source:
    name = type(model).__name__
    family = find_family(name, model.config.model_type)
    state = model.state_dict()
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise InputError(
            f"{name} is no causal language model; give one, with its head, such as AutoModelForCausalLM loads."
        )
    return Source(
        name=name,
        config=model.config,
        family=family,
        folder=None,
        shapes={key: tuple(tensor.shape) for key, tensor in state.items()},
        dtype=model.dtype,
        read=lambda key: state[key].detach(),
    )


def _read_config(folder: Path, family: Family) -> PreTrainedConfig:
    try:
        return CONFIG_MAPPING[family.model_type].from_pretrained(folder)
    except (OSError, TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a {family.model_type}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} holds no model: there is no {path.name}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or not JSON ({error}); copy it anew.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} and not an object; copy it anew.")
    return content


def _read_headers(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]], dict[str, str]]:
    """The file, the shape and the kind of number of every tensor, from the headers of the safetensors."""
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (folder / INDEX).is_file():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
    else:
        other = sorted(path.name for path in folder.glob("*.bin"))
        pickles = f"; {other[0]} may be a pickle, which is never read" if other else ""
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}{pickles}. Save the model as safetensors first, with transformers' "
            "save_pretrained."
        )
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, str] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is incomplete: {INDEX} names {name}, which is missing; copy it anew.")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 -- no mapping
                    header = file.get_slice(key)
                    files[key], shapes[key], kinds[key] = path, tuple(header.get_shape()), header.get_dtype()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}); copy it anew.") from error
    return files, shapes, kinds


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _commonest_dtype(name: str, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]) -> torch.dtype:
    sizes: Counter[str] = Counter()
    for key, kind in kinds.items():
        sizes[kind] += prod(shapes[key])
    kind = max(sizes, key=lambda kind: sizes[kind], default="no tensors")
    if kind not in DTYPES:
        raise CheckpointError(f"{name} holds {kind}, not floating point weights; convert an unquantized checkpoint.")
    return DTYPES[kind]
