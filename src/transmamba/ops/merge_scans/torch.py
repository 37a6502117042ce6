"""merge_scans and begin_scans in plain PyTorch: a gather of whole rows each way, and in the gradients too."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def merge_scans_torch(y: Tensor, places: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (merged, y); see merge_scans."""
    every, back = _rows(places, y.shape[1])
    merged = GatherAndAdd.apply(y.flatten(0, 2), every, back, len(places)).reshape(y.shape[1:])
    return merged if gate is None else merged * silu(gate), y


def begin_scans_torch(x: Tensor, places: Tensor, in_order: bool) -> Tensor:
    """Return u; see begin_scans."""
    if not in_order:
        return x.expand(len(places), *x.shape)
    every, back = _rows(places, len(x))
    return Gather.apply(x.flatten(0, 1), every, back, len(places)).reshape(len(places), *x.shape)


class Gather(torch.autograd.Function):
    """PyTorch's own gradient of a gather adds into zeros, which is slow on GPUs; each of these two is the other's.

    Rows (rows, channels) are read `count` times each, at `every`, and found again at `back`. On GPUs PyTorch moves
    rows of a matrix 16 bytes at a time, and single numbers of what has more dimensions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, every: Tensor, back: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(every, back)
        ctx.count = count
        return x.index_select(0, every)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return GatherAndAdd.apply(gradients[0], *ctx.saved_tensors, ctx.count), None, None, None


class GatherAndAdd(torch.autograd.Function):
    """The other one: `count` rows at `back` for each row, added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, every: Tensor, back: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(every, back)
        ctx.count = count
        found = x.index_select(0, back)
        return found if count == 1 else found.reshape(len(back) // count, count, x.shape[1]).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return Gather.apply(gradients[0], *ctx.saved_tensors, ctx.count), None, None, None


@lru_cache(maxsize=16)  # the layers of a model share them
def _rows(places: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """For so many images, whose patches are rows: the row of every step of all scans, and the steps of every row."""
    count, patches = places.shape
    image = torch.arange(batch, device=places.device)[:, None] * patches
    every = image + torch.argsort(places, dim=1)[:, None, :]
    number = torch.arange(count, device=places.device) * batch * patches
    return every.flatten(), (image[..., None] + places.T + number).flatten()
