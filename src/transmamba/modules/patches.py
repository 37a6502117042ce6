"""Images as patches: the embedding, the positions at any size, and stochastic depth."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transmamba.errors import InputError


class PatchEmbedding(nn.Module):
    """Overlapping or disjoint patches to vectors: (batch, channels, height, width) -> ((batch, patches, hidden), grid).

    patch_size pixels a side, stride pixels apart; what is left over on the right and at the bottom is not read.
    """

    def __init__(self, num_channels: int, hidden_size: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(num_channels, hidden_size, kernel_size=patch_size, stride=stride)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(pixel_values.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        return x.flatten(1, 2), (x.shape[1], x.shape[2])


class DropPath(nn.Module):
    """Stochastic depth: in training, a row's branch is left out with this probability, and scaled up otherwise."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return branch
        kept = 1 - self.probability
        rows = branch.new_empty((branch.shape[0],) + (1,) * (branch.dim() - 1)).bernoulli_(kept)
        return branch * rows / kept if kept else branch * rows

    def extra_repr(self) -> str:
        return f"probability={self.probability}"


def drop_path_rates(rate: float, layers: int) -> list[float]:
    """The probabilities of the layers: from 0 in the first, in even steps, to rate in the last."""
    return [rate * layer / max(1, layers - 1) for layer in range(layers)]


def resize_positions(positions: Tensor, grid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Position embeddings (1, patches, hidden) of a grid, bicubically resized to another grid; as they are if equal."""
    if tuple(grid) == tuple(wanted):
        return positions
    image = positions.transpose(1, 2).unflatten(2, tuple(grid))
    # bicubic kernels have no 16-bit form on every device
    resized = nn.functional.interpolate(image.float(), size=tuple(wanted), mode="bicubic", align_corners=False)
    return resized.to(positions.dtype).flatten(2).transpose(1, 2)


def resize_frames(positions: Tensor, frames: int) -> Tensor:
    """Frame embeddings (1, frames, hidden), linearly resized to another number of frames."""
    if positions.shape[1] == frames:
        return positions
    resized = nn.functional.interpolate(
        positions.float().transpose(1, 2), size=frames, mode="linear", align_corners=False
    )
    return resized.to(positions.dtype).transpose(1, 2)


def check_pixels(
    model: str, pixel_values: Tensor | None, num_channels: int, smallest: int, *, dimensions: int = 4
) -> Tensor:
    """Return pixel_values; raise InputError unless they are images (4 dimensions) or videos (5) that hold a patch."""
    words = "(batch, channels, height, width)" if dimensions == 4 else "(batch, frames, channels, height, width)"
    if pixel_values is None:
        raise InputError(f"{model}: there are no pixel_values; give {words}.")
    shape = tuple(pixel_values.shape)
    if len(shape) != dimensions:
        raise InputError(f"{model}: pixel_values has shape {shape}; give {words}.")
    if not pixel_values.is_floating_point():
        raise InputError(f"{model}: pixel_values has dtype {pixel_values.dtype}; normalise to floating numbers first.")
    if shape[-3] != num_channels:
        raise InputError(
            f"{model}: pixel_values has {shape[-3]} channels and this model was built for {num_channels}; give {words}."
        )
    if min(shape[-2:]) < smallest:
        raise InputError(
            f"{model}: images of {shape[-2]} x {shape[-1]} pixels hold no whole patch; "
            f"give at least {smallest} x {smallest}."
        )
    return pixel_values


def patches_with_token(order: Tensor, position: int, token: int) -> Tensor:
    """The raster indices of a sequence of patches with another token, marked so, put in at this position."""
    marked = order.new_full((1,), token)
    return torch.cat([order[:position], marked, order[position:]])
