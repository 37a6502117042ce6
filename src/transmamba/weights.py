"""The folder of a checkpoint before there is a model: where it is, its JSON, the headers of its safetensors.

What is wrong with it is said in one line. Only safetensors are read and no code of a checkpoint runs.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from transmamba.errors import CheckpointError

__all__ = ["INDEX", "WEIGHTS", "TensorHeader", "find_folder", "read_headers", "read_json"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs"


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
