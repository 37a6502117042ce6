"""Rows read from their last token backward, where rows of a batch differ in length: padding stays behind the tokens."""

import torch
from torch import Tensor


def turn(x: Tensor, turned: Tensor | None) -> Tensor:
    """The tokens of every row, (batch, seq_len, ...), from its last to its first; turned None: no row has padding."""
    if turned is None:
        return x.flip(1)
    index = turned.view(*turned.shape, *(1,) * (x.dim() - 2))
    return x.gather(1, index.expand(*turned.shape, *x.shape[2:]))


def turned_rows(lengths: Tensor, seq_len: int) -> Tensor:
    """For rows of these lengths, (batch,), the index that `turn` takes, (batch, seq_len): its own inverse."""
    places = torch.arange(seq_len, device=lengths.device)
    return torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)
