"""How the tokens of a batch lie: which documents there are, where each begins, and which of its tokens are attention at
a TransPoint.

A batch is *rectangular* when every row brings the same number of tokens of one document: hidden states stay (batch,
seq_len, ...). Otherwise padding is removed and everything lies in one *flat* row, (1, tokens, ...), as documents one
after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from transmamba.errors import InputError


@dataclass(frozen=True)
class ModeSelection:
    """The tokens of one mode: of which documents, how many each, and where in the flattened batch."""

    documents: tuple[int, ...]
    lengths: tuple[int, ...]
    index: Tensor  # (documents, max length) into the flattened tokens; places behind a document's last token repeat it
    inside: Tensor | None  # (documents, max length) bool; None when all lengths are equal

    @property
    def borders(self) -> tuple[int, ...]:
        return (0, *accumulate(self.lengths))

    @property
    def flat_index(self) -> Tensor:
        """(tokens,): the same places without padding."""
        return self.index.flatten() if self.inside is None else self.index[self.inside]


@dataclass(frozen=True)
class ModePlan:
    """A batch cut at one TransPoint."""

    attention: ModeSelection
    ssm: ModeSelection


@dataclass
class TokenLayout:
    """Documents of a batch, in order. With a cache, document i continues the cache's row i.

    lengths: new tokens of each document; pasts: its tokens before this call. gather: (tokens,) places of the real
    tokens in the flattened batch, or None when there is no padding to remove.
    """

    batch: int
    seq_len: int
    lengths: tuple[int, ...]
    pasts: tuple[int, ...]
    rectangular: bool
    device: torch.device
    gather: Tensor | None = None
    packed: bool = False  # whether some row holds several documents
    _plans: dict[int | None, ModePlan] = field(default_factory=dict)

    @staticmethod
    def of(
        batch: int,
        seq_len: int,
        device: torch.device,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        pasts: Sequence[int] | None = None,
    ) -> "TokenLayout":
        """Read the documents off what the caller gives.

        attention_mask (batch, past columns + seq_len), 0 = padding, anywhere. position_ids (batch, seq_len): a document
        begins wherever they do not rise by one; positions are counted anew from there, so offsets do not matter.
        cu_seqlens: borders of the flattened batch. pasts: tokens that each row of a cache holds; a row is then one
        document that goes on, and position_ids are not read.
        """
        rows_only = (seq_len,) * batch
        if cu_seqlens is not None:
            if pasts is not None or attention_mask is not None:
                raise InputError(
                    "cu_seqlens describes packed documents; give it without attention_mask and without a cache."
                )
            borders = _borders(cu_seqlens, batch * seq_len)
            lengths = tuple(later - earlier for earlier, later in pairwise(borders))
            whole = lengths == rows_only
            return TokenLayout(batch, seq_len, lengths, (0,) * len(lengths), whole, device, packed=not whole)
        mask = None if attention_mask is None else _new_columns(attention_mask, batch, seq_len, device)
        if mask is not None and bool(mask.all()):
            mask = None
        if pasts is not None:
            if mask is None:
                return TokenLayout(batch, seq_len, rows_only, tuple(pasts), True, device)
            lengths = tuple(mask.sum(dim=1).tolist())
            return TokenLayout(batch, seq_len, lengths, tuple(pasts), False, device, mask.flatten().nonzero().flatten())
        if position_ids is not None:
            position_ids = position_ids.to(device)
        starts = None if position_ids is None else _document_starts(position_ids, batch, seq_len)
        if mask is None and (starts is None or seq_len == 0 or not bool(starts[:, 1:].any())):
            return TokenLayout(batch, seq_len, rows_only, (0,) * batch, True, device)
        gather = None if mask is None else mask.flatten().nonzero().flatten()
        lengths, packed = rows_only if mask is None else tuple(mask.sum(dim=1).tolist()), False
        if starts is not None:
            documents = _document_lengths(position_ids, starts, gather)
            packed = len(documents) > sum(1 for length in lengths if length)
            lengths = documents if packed else lengths
        return TokenLayout(batch, seq_len, lengths, (0,) * len(lengths), False, device, gather, packed)

    @property
    def borders(self) -> tuple[int, ...] | None:
        """Borders of the packed documents, or None for a rectangular batch."""
        return None if self.rectangular else (0, *accumulate(self.lengths))

    @property
    def uniform_past(self) -> int | None:
        """The common past of all rows of a rectangular batch, else None."""
        return self.pasts[0] if self.rectangular and len(set(self.pasts)) == 1 else None

    @property
    def longest(self) -> int:
        """Tokens of the longest document, its past included."""
        return max([0, *(past + new for past, new in zip(self.pasts, self.lengths, strict=True))])

    def crosses(self, trans_point: int) -> bool:
        """Whether some document reads its token at this position now."""
        return any(past <= trans_point < past + new for past, new in zip(self.pasts, self.lengths, strict=True))

    def positions(self) -> Tensor:
        """Position within the document of every token: (1, seq_len), (batch, seq_len), or (1, tokens) when flat."""
        if self.uniform_past is not None:
            return torch.arange(self.uniform_past, self.uniform_past + self.seq_len, device=self.device)[None]
        pasts = torch.tensor(self.pasts, device=self.device)
        if self.rectangular:
            return pasts[:, None] + torch.arange(self.seq_len, device=self.device)
        lengths = torch.tensor(self.lengths, device=self.device)
        first = lengths.cumsum(0) - lengths
        total = sum(self.lengths)
        shift = torch.repeat_interleave(pasts - first, lengths, output_size=total)
        return (torch.arange(total, device=self.device) + shift)[None]

    def pack(self, x: Tensor) -> Tensor:
        """(batch, seq_len, dim) to the layout's own form."""
        if self.rectangular:
            return x
        x = x.flatten(0, 1)
        return (x if self.gather is None else x[self.gather]).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """Back to (batch, seq_len, dim); padding becomes zero."""
        if self.rectangular:
            return x
        if self.gather is None:
            return x[0].unflatten(0, (self.batch, self.seq_len))
        padded = x.new_zeros(self.batch * self.seq_len, x.shape[-1])
        return padded.index_copy(0, self.gather, x[0]).unflatten(0, (self.batch, self.seq_len))

    def plan(self, trans_point: int | None) -> ModePlan:
        """Cut every document at its own position trans_point; made once per TransPoint and call."""
        if trans_point not in self._plans:
            self._plans[trans_point] = self._cut(trans_point)
        return self._plans[trans_point]

    def _cut(self, trans_point: int | None) -> ModePlan:
        starts = (0, *accumulate(self.lengths))
        attention, ssm = [], []
        for document, (length, past) in enumerate(zip(self.lengths, self.pasts, strict=True)):
            before = length if trans_point is None else min(max(trans_point - past, 0), length)
            if before:
                attention.append((document, starts[document], before))
            if length > before:
                ssm.append((document, starts[document] + before, length - before))
        return ModePlan(self._selection(attention), self._selection(ssm))

    def _selection(self, pieces: list[tuple[int, int, int]]) -> ModeSelection:
        lengths = tuple(length for _, _, length in pieces)
        first = torch.tensor([start for _, start, _ in pieces], dtype=torch.int64)
        count = torch.tensor(lengths, dtype=torch.int64)
        within = torch.arange(max([0, *lengths]))
        index = first[:, None] + torch.minimum(within, count[:, None] - 1)
        inside = None if len(set(lengths)) <= 1 else (within < count[:, None]).to(self.device)
        return ModeSelection(tuple(document for document, _, _ in pieces), lengths, index.to(self.device), inside)


def _borders(cu_seqlens: Tensor | Sequence[int], total: int) -> tuple[int, ...]:
    borders = tuple(cu_seqlens.tolist()) if isinstance(cu_seqlens, Tensor) else tuple(cu_seqlens)
    falls = any(later < earlier for earlier, later in pairwise(borders))
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != total or falls:
        raise InputError(f"cu_seqlens must rise from 0 to the {total} tokens of the batch; it is {list(borders)[:8]}.")
    return borders


def _new_columns(attention_mask: Tensor, batch: int, seq_len: int, device: torch.device) -> Tensor:
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < seq_len:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; give (batch, past + seq_len), "
            f"here ({batch}, at least {seq_len}), 0 for padding."
        )
    return attention_mask[:, attention_mask.shape[1] - seq_len :].to(device) != 0


def _document_starts(position_ids: Tensor, batch: int, seq_len: int) -> Tensor:
    if position_ids.dim() == 1:
        position_ids = position_ids[None]
    if position_ids.dim() != 2 or position_ids.shape[1] != seq_len or position_ids.shape[0] not in (1, batch):
        raise InputError(f"position_ids has shape {tuple(position_ids.shape)}; give ({batch}, {seq_len}).")
    starts = torch.ones(batch, seq_len, dtype=torch.bool, device=position_ids.device)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def _document_lengths(position_ids: Tensor | None, starts: Tensor, gather: Tensor | None) -> tuple[int, ...]:
    assert position_ids is not None
    kept = starts.flatten()
    if gather is not None:  # padding between two tokens does not part them, the border of a row does
        flat, row = position_ids.expand(starts.shape).flatten()[gather], gather // starts.shape[1]
        kept = torch.ones_like(flat, dtype=torch.bool)
        kept[1:] = (flat[1:] != flat[:-1] + 1) | (row[1:] != row[:-1])
    first = kept.nonzero().flatten().tolist()
    return tuple(later - earlier for earlier, later in zip(first, [*first[1:], kept.numel()], strict=True))
