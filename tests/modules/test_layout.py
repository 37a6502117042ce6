"""Token layouts: which documents a batch holds, read off masks, positions and borders; and how they are cut."""

import pytest
import torch
from torch import Tensor

from transmamba.errors import InputError
from transmamba.modules import TokenLayout

CPU = torch.device("cpu")


def layout(batch: int, seq_len: int, **given: object) -> TokenLayout:
    return TokenLayout.of(batch, seq_len, CPU, **given)


def test_full_rows_stay_rectangular() -> None:
    plain = layout(2, 5)
    assert plain.rectangular
    assert plain.borders is None
    assert plain.lengths == (5, 5)
    assert plain.longest == 5
    same = [
        {"attention_mask": torch.ones(2, 5)},
        {"position_ids": torch.arange(5)[None]},
        {"position_ids": torch.arange(9, 14).expand(2, 5)},
        {"cu_seqlens": [0, 5, 10]},
    ]
    assert all(layout(2, 5, **given) == plain for given in same)


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [
        ([[0, 1, 2, 0, 1, 0]], (3, 2, 1)),
        ([[5, 6, 0, 1, 2, 3]], (2, 4)),
        ([[0, 1, 2, 4, 5, 6]], (3, 3)),
        ([[0, 0, 0, 0, 0, 0]], (1,) * 6),
        ([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1]], (6, 2, 2, 2)),
    ],
)
def test_a_document_begins_where_positions_do_not_rise_by_one(
    positions: list[list[int]], lengths: tuple[int, ...]
) -> None:
    found = layout(len(positions), 6, position_ids=torch.tensor(positions))
    assert found.lengths == lengths
    assert found.packed
    assert found.positions().tolist() == [[i for length in lengths for i in range(length)]]


def test_every_window_restarts_positions() -> None:
    found = layout(1, 6, cu_seqlens=torch.tensor([0, 2, 2, 6]))
    assert found.lengths == (2, 0, 4)
    assert found.positions().tolist() == [[0, 1, 0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        ([[0, 0, 1, 1], [1, 1, 1, 1]], (2, 4)),
        ([[1, 0, 0, 0], [1, 1, 1, 0]], (1, 3)),
        ([[0, 1, 1, 0], [0, 0, 0, 0]], (2, 0)),
        ([[1, 0, 1, 1], [1, 1, 0, 0]], (3, 2)),
    ],
)
def test_padding_is_removed_wherever_it_stands(mask: list[list[int]], lengths: tuple[int, ...]) -> None:
    found = layout(2, 4, attention_mask=torch.tensor(mask))
    assert found.lengths == lengths
    assert not found.packed
    x = torch.arange(1.0, 9.0).view(2, 4, 1)
    packed = found.pack(x)
    assert packed.shape == (1, sum(lengths), 1)
    assert torch.equal(found.unpack(packed), x * torch.tensor(mask).unsqueeze(-1))


def test_rows_of_one_document_are_not_packed_when_generation_numbers_their_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = layout(2, 5, attention_mask=mask, position_ids=torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]]))
    assert found.lengths == (3, 5)
    assert not found.packed


def test_padding_and_packing_mix() -> None:
    found = layout(
        2,
        4,
        attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 1, 0, 0], [0, 0, 1, 2]]),
    )
    assert found.lengths == (2, 1, 1, 3)
    assert found.packed


def test_a_cache_moves_every_row_on_by_its_own_past() -> None:
    level = layout(2, 3, pasts=[4, 4])
    assert level.uniform_past == 4
    assert level.positions().tolist() == [[4, 5, 6]]
    ragged = layout(2, 3, pasts=[4, 1])
    assert ragged.rectangular
    assert ragged.uniform_past is None
    assert ragged.positions().tolist() == [[4, 5, 6], [1, 2, 3]]
    assert ragged.longest == 7
    padded = layout(2, 3, pasts=[4, 1], attention_mask=torch.tensor([[1] * 7, [0, 0, 0, 1, 0, 1, 1]]))
    assert padded.positions().tolist() == [[4, 5, 6, 1, 2]]


def test_every_document_is_cut_at_its_own_position() -> None:
    plan = layout(2, 4, pasts=[0, 3]).plan(4)
    assert plan.attention.documents == (0, 1)
    assert plan.attention.lengths == (4, 1)
    assert plan.ssm.documents == (1,)
    assert plan.ssm.flat_index.tolist() == [5, 6, 7]
    assert plan.attention.flat_index.tolist() == [0, 1, 2, 3, 4]
    assert layout(2, 4).plan(None).ssm.documents == ()
    assert layout(2, 4).plan(0).attention.documents == ()


@pytest.mark.parametrize("point", [None, 0, 1, 2, 3, 9])
def test_every_token_has_exactly_one_mode(point: int | None) -> None:
    found = layout(1, 9, cu_seqlens=[0, 3, 3, 4, 9])
    plan = found.plan(point)
    both = torch.cat([plan.attention.flat_index, plan.ssm.flat_index])
    assert sorted(both.tolist()) == list(range(9))
    positions = found.positions()[0]
    assert (positions[plan.ssm.flat_index] >= (9 if point is None else point)).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask has shape \(2, 3\).*at least 4"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(3, 4)}, "attention_mask has shape"),
        ({"position_ids": torch.arange(3)[None]}, r"position_ids has shape \(1, 3\); give \(2, 4\)"),
        ({"position_ids": torch.zeros(3, 4)}, "position_ids has shape"),
        ({"cu_seqlens": [0, 4]}, "rise from 0 to the 8 tokens"),
        ({"cu_seqlens": [1, 8]}, "rise from 0"),
        ({"cu_seqlens": [0, 5, 3, 8]}, "rise from 0"),
        ({"cu_seqlens": [0, 8], "attention_mask": torch.ones(2, 4)}, "without attention_mask"),
        ({"cu_seqlens": [0, 8], "pasts": [1, 1]}, "without a cache"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Tensor | list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        layout(2, 4, **given)
