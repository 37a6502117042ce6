"""Loading a trained model with its tokenizer, and saying in words what is wrong with a folder that is not one."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from transmamba.errors import CheckpointError, TransMambaError
from transmamba.models import TransMambaConfig, TransMambaForCausalLM
from transmamba.progress import without_progress_bars
from transmamba.weights import (
    check_positions,
    check_tokenizer_fits,
    find_folder,
    in_one_line,
    read_headers,
    read_json,
    read_tokenizer,
)

__all__ = ["load_checkpoint", "load_language_model"]

MODEL_FOLDER = "model"  # in the folder of a run
NO_PARAMETER = re.compile(r"rotary_emb\.inv_freq$|attn\.(masked_)?bias$")  # tables that old checkpoints carry
WAY_OUT = "Give a folder that transmamba wrote: model/ in the folder of a run, or a checkpoint-* beside it."


def load_checkpoint(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[TransMambaForCausalLM, PreTrainedTokenizerFast]:
    """The model and the tokenizer of a folder, the model in evaluation mode.

    path: what `save_pretrained` wrote, or the folder of a run, whose model/ is then meant. dtype: None keeps that of
    the weights. Only safetensors are read, and no code from the folder is run.

    Raises:
        CheckpointError: the folder is missing, incomplete or of another kind of model.
    """
    folder = _model_folder(Path(path))
    config = _read_config(folder)
    shapes = {name: header.shape for name, header in read_headers(folder).items()}
    with torch.device("meta"):
        wanted = {name: tuple(x.shape) for name, x in TransMambaForCausalLM(config).state_dict().items()}
    _check_shapes(folder, shapes, wanted, tied=config.tie_word_embeddings)
    tokenizer = _load_tokenizer(folder)
    check_tokenizer_fits(folder, tokenizer, config.vocab_size)
    with without_progress_bars():
        model = TransMambaForCausalLM.from_pretrained(folder, dtype=dtype or "auto", use_safetensors=True)
    return model.to(device).eval(), tokenizer


def load_language_model(
    source: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model of any kind and its tokenizer, the model in evaluation mode: ours, or transformers'.

    source: a folder as in `load_checkpoint`, or that of any checkpoint of transformers, or a Hugging Face id, which is
    downloaded unless it is in the cache. The rest as in `load_checkpoint`.

    Raises:
        CheckpointError: there is none, it is incomplete, damaged, or no causal language model.
    """
    path = Path(source)
    folder = _model_folder(path) if path.is_dir() else find_folder(source)
    if read_json(folder / "config.json").get("model_type") == TransMambaConfig.model_type:
        return load_checkpoint(folder, device=device, dtype=dtype)
    config = _read_any_config(folder)
    read_headers(folder)
    tokenizer = read_tokenizer(folder)
    check_tokenizer_fits(folder, tokenizer, config.get_text_config().vocab_size)
    try:
        with without_progress_bars(), _without_load_report():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are told here, in one line
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"The model in {folder} cannot be loaded: {in_one_line(error)}") from error
    _check_found(folder, found)
    return model.to(device).eval(), tokenizer


def _check_found(folder: Path, found: dict[str, Any]) -> None:
    """What transformers would only warn of: weights that are drawn anew or left out."""
    missing, unknown = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    unknown = [name for name in unknown if not NO_PARAMETER.search(name)]
    mismatched = sorted((name, tuple(shape), tuple(wanted)) for name, shape, wanted in found["mismatched_keys"])
    if mismatched:
        name, shape, wanted = mismatched[0]
        problem = f"{name} has shape {shape} and should have {wanted}"
    elif missing:
        problem = f"{len(missing)} tensors are missing, {missing[0]} first"
    elif unknown:
        problem = f"{unknown[0]} is unknown"
    else:
        return
    raise CheckpointError(f"The weights in {folder} are not those of its config.json: {problem}; copy it anew.")


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from printing a table of what it found, which _check_found says in a line."""
    logger = logging.getLogger("transformers.modeling_utils")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _read_any_config(folder: Path) -> PreTrainedConfig:
    check_positions(folder, read_json(folder / "config.json"))
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a model that transformers knows: {in_one_line(error)}"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{folder} holds a model of type {config.model_type!r}, which is no causal language model."
        )
    return config


def _model_folder(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"There is no {path}. {WAY_OUT}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file. {WAY_OUT}")
    if (path / "config.json").is_file():
        return path
    if (path / MODEL_FOLDER / "config.json").is_file():
        return path / MODEL_FOLDER
    if (path / "run.json").is_file():
        raise CheckpointError(
            f"{path} is a run that has not come to its end, so it has no {MODEL_FOLDER}/ yet; resume it, or give one "
            "of its checkpoint-* folders."
        )
    raise CheckpointError(f"{path} holds no model: there is no config.json. {WAY_OUT}")


def _read_config(folder: Path) -> TransMambaConfig:
    content = read_json(folder / "config.json")
    kind = content.get("model_type")
    if kind != TransMambaConfig.model_type:
        raise CheckpointError(
            f'{folder} holds a model of type {kind!r}, not "{TransMambaConfig.model_type}". {WAY_OUT}'
        )
    try:
        return TransMambaConfig.from_dict(content)
    except (TransMambaError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a model: {error}") from error


def _check_shapes(
    folder: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], *, tied: bool
) -> None:
    needed = set(wanted) - ({"lm_head.weight"} if tied else set())
    missing, unknown = sorted(needed - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        problem = f"{len(missing)} tensors are missing, {missing[0]} first" if missing else f"{unknown[0]} is unknown"
        raise CheckpointError(f"The weights in {folder} are not those of its config.json: {problem}. {WAY_OUT}")
    for name in sorted(found):
        if found[name] != wanted[name]:
            raise CheckpointError(
                f"The weights in {folder} are not those of its config.json: {name} has shape {found[name]} and should "
                f"have {wanted[name]}. {WAY_OUT}"
            )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; save the tokenizer beside the model with save_pretrained."
        )
    return read_tokenizer(folder)
