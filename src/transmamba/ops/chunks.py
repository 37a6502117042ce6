"""Sequences of any lengths as a grid of equal chunks, ordered so that the recurrence between chunks runs over all rows
at once.

Chunks are sorted by their number within the row: all first chunks, then all second ones, and so on, longer rows first.
Step i of the recurrence is then one contiguous slice. Places behind a row's end repeat its last token and get dt = 0,
which leaves the state as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkGrid:
    """How (batch, seq_len) tokens lie in (num_chunks, chunk_size); rows are batch rows or packed documents."""

    batch: int
    seq_len: int
    chunk_size: int
    num_rows: int
    steps: tuple[int, ...]  # chunks in each step of the recurrence, never rising; their sum is num_chunks
    packed: "PackedIndex | None"  # None: every row has seq_len tokens

    @staticmethod
    def of(
        batch: int, seq_len: int, cu_seqlens: Sequence[int] | None, chunk_size: int, device: torch.device
    ) -> "ChunkGrid":
        """Lay out batch rows of seq_len tokens, or the documents between the borders of one packed row."""
        if cu_seqlens is None:
            size = max(1, min(chunk_size, seq_len))
            steps = (batch,) * (-(-seq_len // size)) if batch else ()
            return ChunkGrid(batch, seq_len, size, batch, steps, None)
        packed, steps, size = _packed_index(tuple(cu_seqlens), chunk_size, device)
        return ChunkGrid(batch, seq_len, size, len(cu_seqlens) - 1, steps, packed)

    @property
    def num_chunks(self) -> int:
        return sum(self.steps)

    @property
    def num_first(self) -> int:
        """Chunks of the first step: those that no earlier chunk feeds."""
        return self.steps[0]

    def split(self, x: Tensor, *, pad_with_zero: bool = False) -> Tensor:
        """(batch, seq_len, heads, dim) -> (num_chunks, heads, chunk_size, dim)."""
        if self.packed is not None:
            chunks = x[0][self.packed.source]
            if pad_with_zero:
                chunks = chunks * self.packed.inside[..., None, None]
            return chunks.transpose(1, 2)
        padding = len(self.steps) * self.chunk_size - self.seq_len
        if padding:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding))
        return x.unflatten(1, (-1, self.chunk_size)).permute(1, 0, 3, 2, 4).flatten(0, 1).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """(num_chunks, heads, chunk_size, dim) -> (batch, seq_len, heads, dim)."""
        if self.packed is not None:
            return x.transpose(1, 2).flatten(0, 1)[self.packed.target].unsqueeze(0)
        rows = x.unflatten(0, (-1, self.batch)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        return rows[:, : self.seq_len]

    def recur(
        self, gathered: Tensor, decay: Tensor, initial_state: Tensor | None, state_shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Carry states over chunks: gathered (m, state_heads, n, p), decay (m, dt_heads) -> (state entering each chunk,
        final states).
        """
        order = None if self.packed is None else self.packed.order
        if initial_state is None:
            state = gathered.new_zeros(state_shape)
        else:
            state = initial_state.to(gathered.dtype)
            state = state if order is None else state[order]
        repeats = state_shape[1] // decay.shape[1]
        decay = (decay if repeats == 1 else decay.repeat_interleave(repeats, dim=1))[..., None, None]
        entering, finished = [], []
        # Not slices: the gradient of each would be a whole tensor of zeros.
        for added, factor in zip(gathered.split(self.steps), decay.split(self.steps), strict=True):
            if len(added) < len(state):
                state, ended = state.split((len(added), len(state) - len(added)))
                finished.append(ended)
            entering.append(state)
            state = torch.addcmul(added, state, factor)
        finished.append(state)
        final_state = torch.cat(finished[::-1]) if len(finished) > 1 else finished[0]
        if self.packed is not None:
            final_state = final_state[self.packed.rank]
        return torch.cat(entering), final_state


@dataclass(frozen=True)
class PackedIndex:
    """Index tensors of a grid over packed documents."""

    source: Tensor  # (num_chunks, chunk_size): the token at each place
    inside: Tensor  # (num_chunks, chunk_size): whether the place holds a token, not padding
    target: Tensor  # (seq_len,): the place of each token in the flattened grid
    order: Tensor  # (num_rows,): documents, longest first
    rank: Tensor  # (num_rows,): where each document stands in that order


@lru_cache(maxsize=32)  # the layers of one forward pass share a layout, and so do accumulation steps of equal layout
def _packed_index(
    borders: tuple[int, ...], chunk_size: int, device: torch.device
) -> tuple[PackedIndex, tuple[int, ...], int]:
    starts, lengths = np.asarray(borders[:-1]), np.diff(np.asarray(borders))
    size = max(1, min(chunk_size, int(lengths.max(initial=0))))
    counts = -(-lengths // size)
    order = np.argsort(-counts, kind="stable")
    steps = tuple(int((counts > step).sum()) for step in range(int(counts.max(initial=0))))
    row = np.concatenate([order[:count] for count in steps]) if steps else np.zeros(0, dtype=np.int64)
    number = np.repeat(np.arange(len(steps)), steps)
    within = number[:, None] * size + np.arange(size)
    inside = within < lengths[row][:, None]
    source = starts[row][:, None] + np.minimum(within, lengths[row][:, None] - 1)
    target = np.empty(borders[-1], dtype=np.int64)
    target[source[inside]] = np.flatnonzero(inside)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    return (
        PackedIndex(tensor(source), tensor(inside), tensor(target), tensor(order), tensor(np.argsort(order))),
        steps,
        size,
    )
