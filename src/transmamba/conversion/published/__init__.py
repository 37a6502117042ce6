"""Published checkpoints of vision Mambas as our models: the sizes are read off the tensors, the names off a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from transmamba.conversion.published.plain_mamba import PLAIN_MAMBA
from transmamba.conversion.published.reading import read_weights
from transmamba.conversion.published.table import rename
from transmamba.conversion.published.video_mamba import VIDEO_MAMBA
from transmamba.conversion.published.vim import VIM
from transmamba.conversion.published.vmamba import VMAMBA
from transmamba.errors import CheckpointError
from transmamba.models import VisionMambaClassifier

from .table import PublishedFamily

__all__ = ["PUBLISHED_FAMILIES", "PublishedFamily", "load_published"]

PUBLISHED_FAMILIES: dict[str, PublishedFamily] = {
    family.name: family for family in (PLAIN_MAMBA, VIDEO_MAMBA, VIM, VMAMBA)
}


def load_published(
    path: str | Path, *, family: str | None = None, key: str | None = None, **fields: Any
) -> VisionMambaClassifier:
    """The model in a checkpoint of the published code, ready to run, save or fine-tune.

    Args:
        path: a .pth, .pt or .safetensors file. Only tensors and plain data are unpickled; no code in it runs.
        family: a name of PUBLISHED_FAMILIES; None = found by the names of the tensors, which VideoMamba's models of
            images share with ViM: they are read as "vim" unless "video_mamba" is asked for.
        key: which entry of the file holds the weights, such as "model_ema"; None = the usual ones.
        fields: of the configuration that the tensors do not tell, such as patch_stride=8, or others to replace.

    Raises:
        CheckpointError: the file is missing, of another kind, or holds tensors too many, too few or of other shapes.
    """
    weights = read_weights(Path(path), key)
    found = _family(str(path), family, weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    config = found.configuration(str(path), shapes, fields)
    model = found.model(config)
    weights = weights if found.prepare is None else found.prepare(config, weights)
    model.load_state_dict(rename(str(path), found.moves(config, shapes), weights, model.state_dict()))
    return model.eval()


def _family(path: str, name: str | None, weights: Mapping[str, Tensor]) -> PublishedFamily:
    known = ", ".join(PUBLISHED_FAMILIES)
    if name is not None:
        if name not in PUBLISHED_FAMILIES:
            raise CheckpointError(f"there is no published family {name!r}; choose one of {known}.")
        return PUBLISHED_FAMILIES[name]
    for family in PUBLISHED_FAMILIES.values():
        if family.recognises(weights):
            return family
    raise CheckpointError(
        f"{path} holds {next(iter(weights), 'no tensors')} and others, which are of no known family ({known}); give "
        "family=... if it is one."
    )
