"""Documents cut at a TransPoint: every token once, in order, and back again."""

from itertools import pairwise

import pytest
import torch

from tests.ops.cases import BORDERS, CHUNK
from transmamba.ops.split import split_documents

CPU = torch.device("cpu")


@pytest.mark.parametrize("trans_point", [1, 2, CHUNK, 10 * CHUNK])
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_every_document_is_cut_at_its_own_position(borders: list[int], trans_point: int) -> None:
    split = split_documents(tuple(borders), trans_point, CPU)
    prefix, suffix = [], []
    for start, end in pairwise(borders):
        prefix += range(start, min(end, start + trans_point))
        suffix += range(min(end, start + trans_point), end)
    assert split.prefix.tolist() == prefix
    assert split.suffix.tolist() == suffix
    assert torch.cat([split.prefix, split.suffix])[split.merge].tolist() == list(range(borders[-1]))


def test_a_short_document_keeps_its_place_among_the_suffixes() -> None:
    split = split_documents((0, 5, 7, 7, 11), 3, CPU)
    assert split.prefix_borders == (0, 3, 5, 5, 8)
    assert split.suffix_borders == (0, 2, 2, 2, 3)
