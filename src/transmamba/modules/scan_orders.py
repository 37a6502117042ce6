"""How patches become a sequence: scan orders as data. An order is a permutation of a grid's raster indices.

order[t] is the raster index of the patch that the scan visits at step t, and inverse[order[t]] = t. Any name may end in
"_reversed". A grid is (height, width), or (frames, height, width) for video; each frame of a video is scanned alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from transmamba.errors import InputError
from transmamba.ops.merge_scans.torch import Gather, GatherAndAdd

REVERSED = "_reversed"
START, RIGHT, LEFT, UP, DOWN = range(5)
NUM_MOVES = 5

PLAIN_MAMBA_ORDERS = ("snake", "snake_reversed", "snake_transposed", "snake_transposed_reversed")
BIDIRECTIONAL_ORDERS = ("raster", "raster_reversed")
CROSS_SCAN_ORDERS = ("raster", "transposed", "raster_reversed", "transposed_reversed")
TOKEN_WITHOUT_PATCH = -1


@dataclass(frozen=True, eq=False)
class ScanOrder:
    """A permutation of the patches of a grid and its inverse, each (patches,), int64."""

    name: str
    grid: tuple[int, ...]
    order: Tensor
    inverse: Tensor

    def scan(self, x: Tensor, dim: int) -> Tensor:
        """Patches in raster order to patches in scan order, along dim."""
        return x if self.name == "raster" else x.index_select(dim, self.order)

    def unscan(self, x: Tensor, dim: int) -> Tensor:
        """Patches in scan order back to raster order, along dim."""
        return x if self.name == "raster" else x.index_select(dim, self.inverse)

    def moves(self) -> Tensor:
        """The move that leads to each step of an order of an image, (patches,): START, RIGHT, LEFT, UP or DOWN.

        Raises:
            InputError: the order jumps from patch to patch that are no neighbours.
        """
        return _moves(self.name, self.grid, self.order.device)


@dataclass(frozen=True, eq=False)
class ScanOrders:
    """Several orders of one grid, taken at once: a gather each way, and gathers too in the backward pass.

    order, inverse (patches, orders): those of ScanOrder, side by side. places (orders, patches): the inverses one after
    the other, as the ops begin_scans and merge_scans take them. dim is where the orders stand in a tensor of all
    scans: 1 for (batch, orders, patches, channels), 2 for (batch, patches, orders, channels).
    """

    orders: tuple[ScanOrder, ...]
    order: Tensor
    inverse: Tensor
    places: Tensor

    def scan(self, x: Tensor, dim: int) -> Tensor:
        """Patches in raster order, (batch, patches, channels), to all scan orders."""
        every, back = _rows(self, len(x), dim)
        scanned = Gather.apply(x.flatten(0, 1), every, back, len(self.orders))
        sizes = list(x.shape)
        sizes.insert(dim, len(self.orders))
        return scanned.reshape(sizes)

    def merge(self, x: Tensor, dim: int) -> Tensor:
        """All scan orders back to raster order and added up, (batch, patches, channels)."""
        every, back = _rows(self, len(x), dim)
        merged = GatherAndAdd.apply(x.flatten(0, 2), every, back, len(self.orders))
        return merged.reshape(len(x), len(self.order), x.shape[3])

    def arrange(self, x: Tensor) -> Tensor:
        """What belongs to an order each, (batch, patches, orders, channels), from raster order to these orders."""
        every, back = _rows_of_own(self, len(x))
        return Gather.apply(x.flatten(0, 2), every, back, 1).reshape(x.shape)

    def moves(self) -> Tensor:
        """The moves of every order as unit vectors, (orders, patches, NUM_MOVES), fp32; see ScanOrder.

        A product with them picks a parameter for each step; the gradient of an index would be sorted first.
        """
        return _every_move(self.orders)


@dataclass(frozen=True, eq=False)
class DirectionOutput:
    """What one direction of a layer gives before the directions are merged and projected.

    features (batch, seq_len, channels), in the order of the scan. patches (seq_len,): the raster index of the patch at
    every step, or TOKEN_WITHOUT_PATCH where there is another token, such as a class token. Of text, (batch, seq_len):
    the place of the token, since rows have lengths of their own, or TOKEN_WITHOUT_PATCH in padding. every (directions,
    batch, seq_len, channels): the features of all directions of the layer, in their order, where they are one tensor.
    """

    name: str
    features: Tensor
    patches: Tensor
    grid: tuple[int, ...]
    every: Tensor | None = None

    def in_raster_order(self) -> Tensor:
        """The features of the patches alone, (batch, patches, channels), as they lie in the image.

        Of text, (batch, seq_len, channels), zero in padding.
        """
        if self.patches.dim() == 2:
            is_token = (self.patches != TOKEN_WITHOUT_PATCH)[..., None]
            index = self.patches.clamp(min=0)[..., None].expand_as(self.features)
            return torch.zeros_like(self.features).scatter_add(1, index, torch.where(is_token, self.features, 0.0))
        kept = (self.patches != TOKEN_WITHOUT_PATCH).nonzero().squeeze(1)
        return self.features[:, kept[torch.argsort(self.patches[kept])]]


def scan_order(name: str, grid: Sequence[int], device: torch.device | str = "cpu") -> ScanOrder:
    """The scan order of this name over a grid of patches; the same object for the same arguments.

    Raises:
        InputError: the name is unknown, or does not fit a grid of so many dimensions.
    """
    return _scan_order(name, tuple(int(size) for size in grid), torch.device(device))


def scan_orders(names: Sequence[str], grid: Sequence[int], device: torch.device | str = "cpu") -> ScanOrders:
    """The scan orders of these names over one grid; the same object for the same arguments.

    Raises:
        InputError: as scan_order does.
    """
    return _scan_orders(tuple(names), tuple(int(size) for size in grid), torch.device(device))


def scan_order_names(dimensions: int = 2) -> list[str]:
    """The names of the orders of an image (2) or a video (3)."""
    found = [name for name, (_, fits) in _ORDERS.items() if dimensions in fits]
    return sorted([*found, *(name + REVERSED for name in found)])


@lru_cache(maxsize=256)
def _scan_order(name: str, grid: tuple[int, ...], device: torch.device) -> ScanOrder:
    base = name.removesuffix(REVERSED)
    if base not in _ORDERS or len(grid) not in _ORDERS[base][1]:
        known = ", ".join(scan_order_names(3 if len(grid) == 3 else 2))
        raise InputError(f"there is no scan order {name!r} over a grid {grid}; choose one of {known}.")
    if min(grid) < 1:
        raise InputError(f"a grid of {grid} patches has none to scan; every side must be at least 1.")
    order = _ORDERS[base][0](torch.arange(_product(grid)).reshape(grid))
    if name.endswith(REVERSED):
        order = order.flip(0)
    return ScanOrder(name=name, grid=grid, order=order.to(device), inverse=torch.argsort(order).to(device))


@lru_cache(maxsize=256)
def _scan_orders(names: tuple[str, ...], grid: tuple[int, ...], device: torch.device) -> ScanOrders:
    orders = tuple(_scan_order(name, grid, device) for name in names)
    return ScanOrders(
        orders=orders,
        order=torch.stack([order.order for order in orders], dim=1),
        inverse=torch.stack([order.inverse for order in orders], dim=1),
        places=torch.stack([order.inverse for order in orders]),
    )


@lru_cache(maxsize=16)  # the layers of a model share them
def _rows(orders: ScanOrders, batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """For so many images, whose patches are rows: the row of every place of all scans, and the places of every row."""
    patches, count = orders.order.shape
    image = torch.arange(batch, device=orders.order.device)[:, None, None] * patches
    number = torch.arange(count, device=orders.order.device)
    every = image + orders.order
    if dim == 1:
        return every.transpose(1, 2).flatten(), (image * count + number * patches + orders.inverse).flatten()
    return every.flatten(), ((image + orders.inverse) * count + number).flatten()


@lru_cache(maxsize=16)
def _rows_of_own(orders: ScanOrders, batch: int) -> tuple[Tensor, Tensor]:
    """The same where every order has rows of its own, (batch, patches, orders)."""
    every, back = _rows(orders, batch, 2)
    count = len(orders.orders)
    return (every.unflatten(0, (-1, count)) * count + torch.arange(count, device=every.device)).flatten(), back


@lru_cache(maxsize=256)
def _every_move(orders: tuple[ScanOrder, ...]) -> Tensor:
    return one_hot(torch.stack([order.moves() for order in orders]), NUM_MOVES).float()


@lru_cache(maxsize=256)
def _moves(name: str, grid: tuple[int, ...], device: torch.device) -> Tensor:
    order = _scan_order(name, grid, torch.device("cpu")).order
    rows, columns = order // grid[-1], order % grid[-1]
    moves = torch.full_like(order, START)
    for move, down, right in ((RIGHT, 0, 1), (LEFT, 0, -1), (UP, -1, 0), (DOWN, 1, 0)):
        moves[1:][(rows.diff() == down) & (columns.diff() == right)] = move
    if len(grid) != 2 or bool((moves[1:] == START).any()):
        raise InputError(f"the scan order {name!r} jumps, so its steps have no direction; choose one of the snakes.")
    return moves.to(device)


def _raster(index: Tensor) -> Tensor:
    return index.flatten()


def _transposed(index: Tensor) -> Tensor:
    return index.transpose(-1, -2).flatten()


def _snake(index: Tensor) -> Tensor:
    """Every other row from right to left."""
    rows = index.flatten(0, -2).clone()
    rows[1::2] = rows[1::2].flip(-1)
    return rows.flatten()


def _snake_transposed(index: Tensor) -> Tensor:
    return _snake(index.transpose(-1, -2))


def _diagonal(index: Tensor) -> Tensor:
    """Down each diagonal from the top right, beginning with the one in the bottom left corner."""
    height, width = index.shape[-2:]
    frames = index.reshape(-1, height, width)
    parts = [frame.diagonal(offset) for frame in frames for offset in range(1 - height, width)]
    return torch.cat(parts)


def _antidiagonal(index: Tensor) -> Tensor:
    """Down each diagonal from the right to the left, beginning with the one in the top left corner."""
    width = index.shape[-1]
    frames = index.flip(-1).reshape(-1, *index.shape[-2:])
    offsets = range(width - 1, -index.shape[-2], -1)
    return torch.cat([frame.diagonal(offset) for frame in frames for offset in offsets])


def _temporal_first(index: Tensor) -> Tensor:
    """All frames of one place, then those of the next."""
    return index.flatten(1).T.flatten()


def _product(grid: tuple[int, ...]) -> int:
    count = 1
    for size in grid:
        count *= size
    return count


# Each with the grids that it fits. Over a video, raster is spatial first: frame after frame.
_ORDERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "antidiagonal": (_antidiagonal, (2, 3)),
    "diagonal": (_diagonal, (2, 3)),
    "raster": (_raster, (2, 3)),
    "snake": (_snake, (2,)),
    "snake_transposed": (_snake_transposed, (2,)),
    "spatial_first": (_raster, (3,)),
    "temporal_first": (_temporal_first, (3,)),
    "transposed": (_transposed, (2, 3)),
}
