"""The folder of a checkpoint before there is a model: where it is, its JSON, its tokenizer, the headers of its weights.

What is wrong with it is said in one line. Only safetensors are read and no code of a checkpoint runs.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from transmamba.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "INDEX",
    "WEIGHTS",
    "TensorHeader",
    "check_positions",
    "check_tokenizer_fits",
    "find_folder",
    "in_one_line",
    "read_headers",
    "read_json",
    "read_tokenizer",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"
TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json")
OLD_ROPE_TYPES = {"mrope", "su"}  # names in older configurations, which transformers replaces
LONGEST_REASON = 300  # characters of another library's message


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorHeader:
    """A stored tensor without its values. kind: of number, in safetensors' words, such as BF16."""

    file: Path
    shape: tuple[int, ...]
    kind: str


def find_folder(source: str | Path) -> Path:
    """The local folder of a checkpoint; a Hugging Face id is downloaded first, unless it is in the cache.

    Raises:
        CheckpointError: there is none.
    """
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, truncated, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} holds no model: there is no {path.name}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or not JSON ({error}); copy it anew.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__} and not an object; copy it anew.")
    return content


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor in the safetensors of a folder, whole or in shards.

    Raises:
        CheckpointError: a file is missing, truncated or not what the index says.
    """
    if (folder / WEIGHTS).is_file():
        return _read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        other = sorted(path.name for path in folder.glob("*.bin"))
        pickles = f"; {other[0]} may be a pickle, which is never read" if other else ""
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}{pickles}. Save the model as safetensors first, with transformers' "
            "save_pretrained."
        )
    places = _read_index(folder / INDEX)
    names = sorted(set(places.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        others = len(missing) - 1
        what = f"{missing[0]} and {others} more, which are missing" if others else f"{missing[0]}, which is missing"
        raise CheckpointError(f"{folder} is incomplete: {INDEX} names {what}; copy it anew.")
    headers: dict[str, TensorHeader] = {}
    for name in names:
        headers |= _read_header(folder / name)
    absent = sorted(tensor for tensor in places if tensor not in headers)
    if absent:
        raise CheckpointError(
            f"{folder} is incomplete: {INDEX} names {absent[0]} in {places[absent[0]]}, which does not hold it; the "
            "shards are of different checkpoints, so copy it anew."
        )
    return headers


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    for name in TOKENIZER_JSON:
        if (folder / name).is_file():
            read_json(folder / name)  # transformers' own error for a broken file does not name it
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the `tokenizers` library raises Exception itself for a file that it cannot read
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be loaded, or there is none ({in_one_line(error)}); save one beside the "
            "model with save_pretrained."
        ) from error


def check_tokenizer_fits(folder: Path | str, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Refuse a tokenizer with more entries than its model.

    Raises:
        CheckpointError: it has.
    """
    if len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries and the model {vocab_size}; they do not belong "
            "together, or the model's embeddings were to be resized to the tokenizer."
        )


def check_positions(folder: Path, content: dict[str, Any]) -> None:
    """Refuse what config.json says of positions where transformers would go on with a warning, or not understand.

    Raises:
        CheckpointError: no positions, a rotary embedding of unknown type, or a factor that cannot be.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    path = folder / "config.json"
    for name in ("max_position_embeddings", "n_positions"):
        value = content.get(name)
        if isinstance(value, int) and value < 1:
            raise CheckpointError(f"{path} has {name}={value}; it must be at least 1.")
    for rope in _ropes(content):
        kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
        known = {"default", *ROPE_INIT_FUNCTIONS}
        if kind not in known | OLD_ROPE_TYPES:
            raise CheckpointError(
                f"{path} has a rotary embedding of type {kind!r}, which is not known; known are "
                f"{', '.join(sorted(known))}."
            )
        if factor is not None and (not isinstance(factor, int | float) or not factor >= 1):
            raise CheckpointError(f"{path} scales the rotary embedding by factor={factor!r}; it must be at least 1.")
        lengths = {
            name: len(rope[name]) for name in ("short_factor", "long_factor") if isinstance(rope.get(name), list)
        }
        wanted = _rotary_pairs(content)
        for name, found in lengths.items():
            if wanted is not None and found != wanted:
                raise CheckpointError(f"{path} has {found} entries of {name}; a head of this model needs {wanted}.")


def in_one_line(error: Exception) -> str:
    """Another library's error in one line, and not a long one; its type where it says little."""
    reason = " ".join(str(error).split())
    if isinstance(error, KeyError) or not reason:
        reason = f"{type(error).__name__} {reason}".strip()
    return reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 3] + "..."


def _ropes(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rotary embeddings of a config.json, under today's name and the older one, also where layers differ."""
    for name in ("rope_parameters", "rope_scaling"):
        given = content.get(name)
        if isinstance(given, dict):
            nested = [kind for kind in given.values() if isinstance(kind, dict)]
            yield from nested or [given]


def _rotary_pairs(content: dict[str, Any]) -> int | None:
    """Half of a head's rotated dimensions, where config.json says it plainly."""
    width, heads = content.get("hidden_size"), content.get("num_attention_heads")
    size = content.get("head_dim") or (width // heads if isinstance(width, int) and isinstance(heads, int) else None)
    return None if size is None or "partial_rotary_factor" in content else size // 2


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor; only names of files beside the index are let through."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path} has no weight_map that says which file holds which tensor; copy it anew.")
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path} names {name!r} for {tensor}, which is not a file beside it; copy it anew.")
    return places


def _read_header(path: Path) -> dict[str, TensorHeader]:
    headers: dict[str, TensorHeader] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 -- no mapping
                header = file.get_slice(key)
                headers[key] = TensorHeader(file=path, shape=tuple(header.get_shape()), kind=header.get_dtype())
    except (SafetensorError, OSError) as error:
        if _begins_with(path, LFS_POINTER):
            raise CheckpointError(f"{path} is a Git LFS pointer and not the file itself; run git lfs pull.") from error
        raise CheckpointError(f"{path} is truncated or damaged ({error}); copy it anew.") from error
    return headers


def _begins_with(path: Path, prefix: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(prefix)) == prefix
    except OSError:
        return False


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
