"""Scan orders are permutations of the grid, and the ones that their names say."""

from functools import partial

import pytest
import torch

from transmamba.errors import InputError
from transmamba.modules.scan_orders import (
    NUM_MOVES,
    PLAIN_MAMBA_ORDERS,
    DirectionOutput,
    scan_order,
    scan_order_names,
    scan_orders,
)

GRIDS = [(1, 1), (1, 5), (4, 1), (2, 3), (3, 2), (4, 4), (5, 7)]
VIDEO_GRIDS = [(1, 2, 3), (3, 1, 1), (2, 3, 4)]


@pytest.mark.parametrize("grid", [*GRIDS, *VIDEO_GRIDS], ids=str)
def test_every_order_visits_every_patch_once_and_back(grid: tuple[int, ...]) -> None:
    for name in scan_order_names(len(grid)):
        order = scan_order(name, grid)
        patches = torch.arange(len(order.order))
        assert torch.equal(order.order.sort().values, patches)
        assert torch.equal(order.order[order.inverse], patches)
        x = torch.randn(2, len(patches), 3)
        assert torch.equal(order.unscan(order.scan(x, 1), 1), x)
        assert torch.equal(order.scan(x, 1)[:, 0], x[:, order.order[0]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raster", [0, 1, 2, 3, 4, 5]),
        ("raster_reversed", [5, 4, 3, 2, 1, 0]),
        ("transposed", [0, 3, 1, 4, 2, 5]),
        ("snake", [0, 1, 2, 5, 4, 3]),
        ("snake_reversed", [3, 4, 5, 2, 1, 0]),
        ("snake_transposed", [0, 3, 4, 1, 2, 5]),
        ("snake_transposed_reversed", [5, 2, 1, 4, 3, 0]),
        ("diagonal", [3, 0, 4, 1, 5, 2]),
        ("antidiagonal", [0, 1, 3, 2, 4, 5]),
    ],
)
def test_orders_of_two_rows_of_three(name: str, expected: list[int]) -> None:
    assert scan_order(name, (2, 3)).order.tolist() == expected


def test_orders_of_two_frames_of_one_row_of_two() -> None:
    grid = (2, 1, 2)
    assert scan_order("spatial_first", grid).order.tolist() == [0, 1, 2, 3]
    assert scan_order("temporal_first", grid).order.tolist() == [0, 2, 1, 3]
    assert scan_order("temporal_first_reversed", grid).order.tolist() == [3, 1, 2, 0]
    assert scan_order("antidiagonal", (2, 2, 2)).order.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", PLAIN_MAMBA_ORDERS)
def test_a_snake_moves_to_a_neighbour(name: str, grid: tuple[int, int]) -> None:
    order = scan_order(name, grid)
    moves = order.moves().tolist()
    assert moves[0] == 0
    step = {1: (0, 1), 2: (0, -1), 3: (-1, 0), 4: (1, 0)}
    places = [divmod(patch, grid[1]) for patch in order.order.tolist()]
    for (row, column), after, move in zip(places, places[1:], moves[1:], strict=False):
        assert after == (row + step[move][0], column + step[move][1])


def test_a_raster_has_no_moves() -> None:
    with pytest.raises(InputError, match="'raster' jumps"):
        scan_order("raster", (2, 3)).moves()


def test_moves_of_two_rows_of_three() -> None:
    assert scan_order("snake", (2, 3)).moves().tolist() == [0, 1, 1, 4, 2, 2]
    assert scan_order("snake_reversed", (2, 3)).moves().tolist() == [0, 1, 1, 3, 2, 2]


@pytest.mark.parametrize(
    ("name", "grid", "message"),
    [
        ("spiral", (2, 3), "no scan order 'spiral' over a grid (2, 3); choose one of antidiagonal, "),
        ("temporal_first", (2, 3), "no scan order 'temporal_first'"),
        ("snake", (2, 2, 3), "no scan order 'snake'"),
        ("raster", (0, 3), "a grid of (0, 3) patches has none"),
    ],
)
def test_an_order_that_is_none_is_refused(name: str, grid: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        scan_order(name, grid)
    assert message in str(caught.value)


def test_directions_come_back_to_the_image_without_their_class_token() -> None:
    order = scan_order("snake_reversed", (2, 3))
    x = torch.randn(2, 6, 4)
    patches = torch.cat([order.order[:2], torch.tensor([-1]), order.order[2:]])
    scanned = order.scan(x, 1)
    features = torch.cat([scanned[:, :2], torch.zeros(2, 1, 4), scanned[:, 2:]], dim=1)
    direction = DirectionOutput(name=order.name, features=features, patches=patches, grid=(2, 3))
    assert torch.equal(direction.in_raster_order(), x)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 4)], ids=str)
def test_several_orders_at_once_are_each_order_and_merging_adds_them_up(grid: tuple[int, int], dim: int) -> None:
    names = tuple(scan_order_names())
    orders = scan_orders(names, grid)
    x = torch.randn(2, grid[0] * grid[1], 3, dtype=torch.float64, requires_grad=True)
    scanned = orders.scan(x, dim)
    one_by_one = [scan_order(name, grid).scan(x, 1) for name in names]
    assert torch.equal(scanned, torch.stack(one_by_one, dim))
    y = torch.randn_like(scanned).requires_grad_()
    one_by_one = [scan_order(name, grid).unscan(one, 1) for name, one in zip(names, y.unbind(dim), strict=True)]
    # Sums of as many terms in another order: a rounding for each.
    bound = len(names) * 2.0**-52 * y.abs().sum(dim).max().item()
    assert torch.allclose(orders.merge(y, dim), torch.stack(one_by_one).sum(0), rtol=0, atol=bound)
    assert torch.autograd.gradcheck(partial(orders.scan, dim=dim), (x,))
    assert torch.autograd.gradcheck(partial(orders.merge, dim=dim), (y,))
    assert torch.autograd.gradgradcheck(partial(orders.scan, dim=dim), (x,))
    assert scan_orders(names, grid) is orders


def test_what_belongs_to_one_order_each_is_put_in_that_order() -> None:
    orders = scan_orders(PLAIN_MAMBA_ORDERS, (2, 3))
    x = torch.randn(2, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    each = [order.scan(one, 1) for order, one in zip(orders.orders, x.unbind(2), strict=True)]
    assert torch.equal(orders.arrange(x), torch.stack(each, 2))
    assert torch.autograd.gradcheck(orders.arrange, (x,))
    assert orders.arrange(x[:0]).shape == (0, 6, 4, 3)
    assert orders.merge(orders.scan(x[:0, :, 0], 1), 1).shape == (0, 6, 3)


def test_moves_of_several_orders_are_unit_vectors() -> None:
    orders = scan_orders(PLAIN_MAMBA_ORDERS, (2, 3))
    assert orders.moves().shape == (4, 6, NUM_MOVES)
    assert torch.equal(orders.moves().sum(-1), torch.ones(4, 6))
    assert orders.moves().argmax(-1).tolist() == [scan_order(n, (2, 3)).moves().tolist() for n in PLAIN_MAMBA_ORDERS]
