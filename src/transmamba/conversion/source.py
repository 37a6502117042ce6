"""What is converted: a folder, a Hugging Face id or a model in memory, read one tensor at a time.

Only safetensors are read and no code of a checkpoint runs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from transmamba.errors import CheckpointError, InputError
from transmamba.weights import TensorHeader, check_positions, find_folder, in_one_line, read_headers, read_json

from .sources import Family, find_family

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
    content = read_json(folder / "config.json")
    family = find_family(str(source), content.get("model_type"))
    if content.get("quantization_config"):
        raise CheckpointError(f"{source} is quantized; convert the checkpoint that it was made from.")
    check_positions(folder, content)
    config = _read_config(folder, family)
    headers = read_headers(folder)
    return Source(
        name=str(source),
        config=config,
        family=family,
        folder=folder,
        shapes={name: header.shape for name, header in headers.items()},
        dtype=_commonest_dtype(str(source), headers.values()),
        read=lambda name: _read_tensor(headers[name].file, name),
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer beside the model."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


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
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a {family.model_type}: {in_one_line(error)}"
        ) from error


def _read_tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _commonest_dtype(name: str, headers: Iterable[TensorHeader]) -> torch.dtype:
    sizes: Counter[str] = Counter()
    for header in headers:
        sizes[header.kind] += prod(header.shape)
    kind = max(sizes, key=lambda kind: sizes[kind], default="no tensors")
    if kind not in DTYPES:
        raise CheckpointError(f"{name} holds {kind}, not floating point weights; convert an unquantized checkpoint.")
    return DTYPES[kind]
