"""The grid of chunks: every token in one place, none of its padding seen."""

from itertools import pairwise

import pytest
import torch

from tests.ops.cases import BORDERS, CHUNK
from transmamba.ops.chunks import ChunkGrid

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunk_size", [1, 3, CHUNK])
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_packed_tokens_come_back_where_they_were(borders: list[int], chunk_size: int) -> None:
    grid = ChunkGrid.of(1, borders[-1], borders, chunk_size, CPU)
    x = torch.randn(1, borders[-1], 2, 3)
    if grid.num_chunks:
        assert torch.equal(grid.join(grid.split(x)), x)
    longest = max(end - start for start, end in pairwise(borders))
    assert len(grid.steps) == -(-longest // grid.chunk_size)
    assert sorted(grid.steps, reverse=True) == list(grid.steps)


@pytest.mark.parametrize("seq_len", [1, 5, 6, 7, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_tokens_come_back_where_they_were(batch: int, seq_len: int) -> None:
    grid = ChunkGrid.of(batch, seq_len, None, 6, CPU)
    x = torch.randn(batch, seq_len, 2, 3)
    assert torch.equal(grid.join(grid.split(x)), x)
    assert grid.num_chunks == batch * -(-seq_len // 6)


def test_padding_is_zero_where_asked() -> None:
    packed = ChunkGrid.of(1, 7, [0, 5, 5, 7], 4, CPU)
    assert packed.split(torch.ones(1, 7, 1, 1), pad_with_zero=True).sum() == 7
    dense = ChunkGrid.of(2, 7, None, 4, CPU)
    assert dense.split(torch.ones(2, 7, 1, 1), pad_with_zero=True).sum() == 14


def test_a_short_row_takes_a_short_chunk() -> None:
    assert ChunkGrid.of(2, 5, None, 64, CPU).chunk_size == 5
    assert ChunkGrid.of(1, 7, [0, 3, 7], 64, CPU).chunk_size == 4


@pytest.mark.parametrize("borders", [None, [0, 9, 9, 10, 40]], ids=["dense", "packed"])
def test_the_recurrence_costs_its_gradient_no_tensor_per_step(borders: list[int] | None) -> None:
    """The gradient of a slice is as large as all the states together: time square in the length."""
    grid = ChunkGrid.of(1, 40, borders, 1, CPU)
    state_heads = (grid.num_rows, 2, 3, 3)
    gathered = torch.randn(grid.num_chunks, 2, 3, 3, requires_grad=True)
    decay = torch.rand(grid.num_chunks, 2, requires_grad=True)
    entering, final_state = grid.recur(gathered, decay, None, state_heads)
    seen, nodes = set(), [entering.grad_fn, final_state.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    assert not [node.name() for node in seen if "SliceBackward" in node.name()]
