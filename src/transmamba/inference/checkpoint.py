"""Loading a trained model with its tokenizer, and saying in words what is wrong with a folder that is not one."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from transmamba.errors import CheckpointError, TransMambaError
from transmamba.models import TransMambaConfig, TransMambaForCausalLM
from transmamba.progress import without_progress_bars

__all__ = ["load_checkpoint", "load_teacher"]

MODEL_FOLDER = "model"  # in the folder of a run
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
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
    shapes = _read_shapes(folder)
    with torch.device("meta"):
        wanted = {name: tuple(x.shape) for name, x in TransMambaForCausalLM(config).state_dict().items()}
    _check_shapes(folder, shapes, wanted, tied=config.tie_word_embeddings)
    tokenizer = _load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries and the model {config.vocab_size}; they do not "
            f"belong together. {WAY_OUT}"
        )
    with without_progress_bars():
        model = TransMambaForCausalLM.from_pretrained(folder, dtype=dtype or "auto", use_safetensors=True)
    return model.to(device).eval(), tokenizer


def load_teacher(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The causal language model and the tokenizer of a folder, the model in its own class and in evaluation mode.

    path: the folder of any causal language model that transformers knows, or what load_checkpoint takes. Only
    safetensors are read, and no code from the folder is run.

    Raises:
        CheckpointError: the folder is missing, incomplete, or holds no such model.
    """
    folder = _model_folder(Path(path))
    if _read_json(folder / "config.json").get("model_type") == TransMambaConfig.model_type:
        return load_checkpoint(folder, device=device, dtype=dtype)
    _read_shapes(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with without_progress_bars():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} cannot be loaded as a causal language model: {reason}") from error
    if loading["missing_keys"]:  # transformers draws them at random and goes on
        raise CheckpointError(
            f"{folder} is incomplete: there is no tensor {min(loading['missing_keys'])} in it. Copy it anew."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"The tokenizer in {folder} is a {type(tokenizer).__name__}, written in Python; save a tokenizer.json."
        )
    return model.to(device).eval(), tokenizer


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
    content = _read_json(folder / "config.json")
    kind = content.get("model_type")
    if kind != TransMambaConfig.model_type:
        raise CheckpointError(
            f'{folder} holds a model of type {kind!r}, not "{TransMambaConfig.model_type}". {WAY_OUT}'
        )
    try:
        return TransMambaConfig.from_dict(content)
    except (TransMambaError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a model: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or not JSON ({error}). {WAY_OUT}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} and not an object. {WAY_OUT}")
    return content


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the folder's safetensors, from their headers."""
    if (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (folder / INDEX).is_file():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
    else:
        other = sorted(path.name for path in folder.glob("*.bin"))
        pickles = f"; {other[0]} may be a pickle, which is never read" if other else ""
        raise CheckpointError(f"{folder} has a config.json and no {WEIGHTS}{pickles}. {WAY_OUT}")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is incomplete: {INDEX} names {name}, which is missing. Copy it anew.")
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 -- no mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged ({error}). Copy it anew, or use an earlier one."
            ) from error
    return shapes


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
    _read_json(file)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The tokenizer in {folder} cannot be loaded: {error}") from error
