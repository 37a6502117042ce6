"""Rows of any lengths cut into segments, each of which one GPU program reads from end to end.

Programs carry the state over the chunks of their segment in registers, so fewer segments move fewer bytes; more
segments keep more of the card busy. A row that is one segment needs no pass over the keys and values to learn what
state its segments start from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

# Columns of the table of segments.
BATCH, START, COUNT, FIRST_CHUNK, ROW, IS_FIRST, IS_LAST, NUM_COLUMNS = range(8)


@dataclass(frozen=True, eq=False)  # compared by identity: hashing the table would cost more than a launch
class Segments:
    """How the tokens of all rows (of the batch, or packed documents) lie in segments, and segments in chunks."""

    num_rows: int
    num_chunks: int
    longest: int  # chunks of the longest segment
    table: tuple[tuple[int, ...], ...]  # one line per segment, row after row; see the columns above
    first_of_row: tuple[int, ...]  # num_rows + 1 numbers; a row without tokens has no segment

    @staticmethod
    def of(batch: int, seq_len: int, borders: Sequence[int] | None, chunk_size: int, per_segment: int) -> "Segments":
        """Cut every row into equal segments of about `per_segment` chunks; rows up to half as long again stay whole."""
        return _segments(batch, seq_len, None if borders is None else tuple(borders), chunk_size, per_segment)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def whole_rows(self) -> bool:
        """Whether no row is cut."""
        return all(line[IS_FIRST] and line[IS_LAST] for line in self.table)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The table, (segments, columns), and first_of_row as int32 tensors."""
        return _on(self, device)


@lru_cache(maxsize=64)
def _segments(batch: int, seq_len: int, borders: tuple[int, ...] | None, chunk_size: int, per_segment: int) -> Segments:
    spans = [(b, 0, seq_len) for b in range(batch)] if borders is None else [(0, *span) for span in pairwise(borders)]
    table: list[tuple[int, ...]] = []
    first_of_row = [0]
    chunk = 0
    longest = 0
    for row, (b, start, end) in enumerate(spans):
        chunks = -(-(end - start) // chunk_size)
        pieces = max(1, round(chunks / per_segment)) if chunks else 0
        for piece in range(pieces):
            first, last = piece * chunks // pieces, (piece + 1) * chunks // pieces
            begin, stop = start + first * chunk_size, min(end, start + last * chunk_size)
            table.append((b, begin, stop - begin, chunk + first, row, piece == 0, piece == pieces - 1))
            longest = max(longest, last - first)
        chunk += chunks
        first_of_row.append(len(table))
    lines = tuple(tuple(int(x) for x in line) for line in table)
    return Segments(len(spans), chunk, longest, lines, tuple(first_of_row))


@lru_cache(maxsize=64)  # the layers of one forward pass share a layout
def _on(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor]:
    table = torch.tensor(segments.table, dtype=torch.int32).reshape(-1, NUM_COLUMNS)
    return table.to(device), torch.tensor(segments.first_of_row, dtype=torch.int32).to(device)
