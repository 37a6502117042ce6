"""Patches, positions at any size, and stochastic depth."""

import pytest
import torch

from tests.helpers import relative_rms_error
from transmamba.modules import DropPath, PatchEmbedding
from transmamba.modules.patches import drop_path_rates, patches_with_token, resize_frames, resize_positions


def test_overlapping_patches_are_windows_of_the_image() -> None:
    embed, x = PatchEmbedding(3, 5, 4, 2), torch.randn(2, 3, 9, 6)
    tokens, grid = embed(x)
    assert grid == (3, 2)
    assert tokens.shape == (2, 6, 5)
    window = x[:, :, 2:6, 2:6]
    expected = torch.einsum("bchw,dchw->bd", window, embed.proj.weight) + embed.proj.bias
    assert relative_rms_error(tokens[:, 1 * 2 + 1], expected) < 1e-5


def test_a_branch_is_dropped_by_row_and_kept_on_average() -> None:
    drop, x = DropPath(0.25).train(), torch.ones(20_000, 2, 3)
    y = drop(x)
    rows = y.flatten(1)
    assert (rows == rows[:, :1]).all()
    assert rows.unique().tolist() == pytest.approx([0.0, 4 / 3])
    # The share of kept rows is binomial: five standard deviations.
    assert abs(y.mean().item() - 1) < 5 * (0.25 / 0.75 / len(x)) ** 0.5
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)
    assert not DropPath(1.0).train()(x).any()


def test_drop_path_rates_grow_evenly() -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0.0]


def test_positions_keep_their_grid_and_follow_a_new_one() -> None:
    positions = torch.randn(1, 12, 5)
    assert resize_positions(positions, (3, 4), (3, 4)) is positions
    assert resize_positions(positions, (3, 4), (5, 2)).shape == (1, 10, 5)
    flat = torch.full((1, 12, 5), 0.7)
    assert torch.allclose(resize_positions(flat, (3, 4), (7, 9)), torch.tensor(0.7))
    # Rows that rise along the height still do, and the columns stay equal.
    rising = torch.arange(3.0)[:, None].expand(3, 4).reshape(1, 12, 1)
    resized = resize_positions(rising, (3, 4), (6, 8)).reshape(6, 8)
    assert (resized.diff(dim=0) > 0).all()
    assert torch.allclose(resized, resized[:, :1].expand(6, 8), atol=1e-6)
    assert resize_positions(positions.bfloat16(), (3, 4), (6, 8)).dtype == torch.bfloat16


def test_frames_are_resized_in_time() -> None:
    frames = torch.arange(4.0).reshape(1, 4, 1)
    assert resize_frames(frames, 4) is frames
    assert resize_frames(frames, 2).flatten().tolist() == [0.5, 2.5]
    assert resize_frames(frames, 8).flatten().diff().min() >= 0


def test_a_token_is_put_among_the_patches() -> None:
    assert patches_with_token(torch.tensor([2, 0, 1]), 1, -1).tolist() == [2, -1, 0, 1]
