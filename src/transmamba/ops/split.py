"""Packed documents cut at a TransPoint: the tokens before it, those after it, and how to put them together again."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentSplit:
    """Indices into the packed row.

    Documents shorter than the TransPoint have an empty suffix, and keep their place in the borders.
    """

    prefix: Tensor
    suffix: Tensor
    prefix_borders: tuple[int, ...]
    suffix_borders: tuple[int, ...]
    merge: Tensor  # where each token stands in cat(prefix, suffix)


@lru_cache(maxsize=64)  # layers with one TransPoint share the split of a batch
def split_documents(borders: tuple[int, ...], trans_point: int, device: torch.device) -> DocumentSplit:
    """Cut every document at its own position trans_point."""
    starts, lengths = np.asarray(borders[:-1]), np.diff(np.asarray(borders))
    position = np.arange(borders[-1]) - np.repeat(starts, lengths)
    prefix, suffix = np.flatnonzero(position < trans_point), np.flatnonzero(position >= trans_point)
    before = np.minimum(lengths, trans_point)
    merge = np.argsort(np.concatenate([prefix, suffix]))
    return DocumentSplit(
        prefix=torch.from_numpy(prefix).to(device),
        suffix=torch.from_numpy(suffix).to(device),
        prefix_borders=(0, *np.cumsum(before).tolist()),
        suffix_borders=(0, *np.cumsum(lengths - before).tolist()),
        merge=torch.from_numpy(merge).to(device),
    )
