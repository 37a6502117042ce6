"""Segments cover every token once, in whole chunks, and say where rows begin and end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transmamba.ops.segments import BATCH, COUNT, FIRST_CHUNK, IS_FIRST, IS_LAST, NUM_COLUMNS, ROW, START, Segments


@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    chunk_size=st.sampled_from([1, 4, 16]),
    per_segment=st.integers(1, 9),
)
def test_segments_cover_packed_rows(lengths: list[int], chunk_size: int, per_segment: int) -> None:
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    segments = Segments.of(1, borders[-1], borders, chunk_size, per_segment)
    covered = [token for line in segments.table for token in range(line[START], line[START] + line[COUNT])]
    assert covered == list(range(borders[-1]))
    assert segments.num_rows == len(lengths)
    chunk = 0
    for line in segments.table:
        assert len(line) == NUM_COLUMNS
        assert line[FIRST_CHUNK] == chunk
        assert borders[line[ROW]] <= line[START]
        assert line[START] + line[COUNT] <= borders[line[ROW] + 1]
        assert (line[START] - borders[line[ROW]]) % chunk_size == 0
        assert line[IS_FIRST] == (line[START] == borders[line[ROW]])
        assert line[IS_LAST] == (line[START] + line[COUNT] == borders[line[ROW] + 1])
        assert -(-line[COUNT] // chunk_size) <= segments.longest
        chunk += -(-line[COUNT] // chunk_size)
    assert chunk == segments.num_chunks
    rows = [line[ROW] for line in segments.table]
    assert segments.first_of_row == tuple(sum(row < i for row in rows) for i in range(len(lengths) + 1))


@pytest.mark.parametrize(("per_segment", "whole"), [(10, True), (7, True), (6, False), (1, False)])
def test_rows_stay_whole_up_to_half_as_long_again(per_segment: int, whole: bool) -> None:
    segments = Segments.of(3, 100, None, 10, per_segment)
    assert segments.whole_rows == whole
    assert {line[BATCH] for line in segments.table} == {0, 1, 2}


@pytest.mark.parametrize("batch", [0, 2])
def test_without_tokens_there_are_no_segments(batch: int) -> None:
    segments = Segments.of(batch, 0, None, 16, 4)
    assert len(segments) == segments.num_chunks == segments.longest == 0
    assert segments.first_of_row == (0,) * (batch + 1)
    assert segments.whole_rows
