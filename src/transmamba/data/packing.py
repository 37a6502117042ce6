"""Packing: documents of any length into windows of one length, without padding between them.

A document is its tokens and `eos_token`. Documents follow each other in order, and the stream is cut every `seq_len`
tokens. Inside a window every document starts anew: positions from 0, nothing predicted from the document before.
What a window cuts off goes on in the next one, from position 0 and without its past.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from transmamba.data.tokenizers import document_encoder, token_byte_lengths
from transmamba.errors import CorpusError, InputError
from transmamba.progress import progress_bar

__all__ = ["IGNORE_INDEX", "PackedDataset", "pack_documents"]

IGNORE_INDEX = -100  # the label that Hugging Face models leave out of the loss

BATCH_BYTES = 4_000_000  # of text tokenised at once; bounds the library's working memory, and steps the progress bar
COUNT_TOKENS = 1 << 22  # tokens looked up at once when bytes are counted; bounds the memory of that


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Windows of `seq_len` tokens, made by `pack_documents`.

    An item holds three int64 tensors of shape (seq_len,), which any collator stacks:
        input_ids
        position_ids: 0 at the start of the window and, with boundaries, of every document; counting up from there
        labels: input_ids, but -100 where position_ids is 0 and in padding. Models shift labels by one, so a label at
            position 0 would be predicted from another document, or from nothing
    Only the last window may end in padding: `eos_token`, with positions as if it were one more document.

    Attributes:
        tokens: the windows behind each other, shape (num_windows * seq_len,), uint16 or uint32.
        document_starts: indices into tokens where documents, or the padding, begin; ascending, int64.
        seq_len: tokens per window.
        num_tokens: tokens of all windows together, with `eos_token`, without padding.
        byte_lengths: bytes of UTF-8 by token id, shape (vocab_size,), int64; 0 for special tokens.
        boundaries: whether documents start anew inside a window.
    """

    def __init__(
        self,
        *,
        tokens: np.ndarray,
        document_starts: np.ndarray,
        seq_len: int,
        num_tokens: int,
        byte_lengths: np.ndarray,
        boundaries: bool,
    ) -> None:
        assert tokens.size % seq_len == 0
        assert tokens.size - seq_len < num_tokens <= tokens.size
        self.tokens = tokens
        self.document_starts = document_starts
        self.seq_len = seq_len
        self.num_tokens = num_tokens
        self.byte_lengths = byte_lengths
        self.boundaries = boundaries

    def __len__(self) -> int:
        return self.tokens.size // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = range(0, self.tokens.size, self.seq_len)[index]
        input_ids = self.tokens[start : start + self.seq_len].astype(np.int64)
        position_ids = self._position_ids(start)
        is_predicted = (position_ids > 0) & (np.arange(start, start + self.seq_len) < self.num_tokens)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(np.where(is_predicted, input_ids, IGNORE_INDEX)),
            "position_ids": torch.from_numpy(position_ids),
        }

    def num_bytes(self, index: int | None = None) -> int:
        """Bytes of UTF-8 in the predicted tokens, those whose label is not -100, of one window or of all.

        The summed loss over these bytes is the loss per byte, which compares between tokenizers. `eos_token` is
        predicted and has no bytes: its loss is the price of saying that a document ends, paid once per document.
        """
        if index is not None:
            labels = self[index]["labels"].numpy()
            return int(self.byte_lengths[labels[labels != IGNORE_INDEX]].sum())
        blocks = range(0, self.tokens.size, COUNT_TOKENS)
        all_bytes = sum(int(self.byte_lengths[self.tokens[i : i + COUNT_TOKENS]].sum()) for i in blocks)
        not_predicted = np.arange(0, self.tokens.size, self.seq_len)
        if self.boundaries:
            not_predicted = np.union1d(not_predicted, self.document_starts)
        return all_bytes - int(self.byte_lengths[self.tokens[not_predicted]].sum())

    def _position_ids(self, start: int) -> np.ndarray:
        positions = np.arange(self.seq_len, dtype=np.int64)
        if not self.boundaries:
            return positions
        first, last = np.searchsorted(self.document_starts, [start, start + self.seq_len])
        starts_here = self.document_starts[first:last] - start
        segment_starts = np.zeros_like(positions)
        segment_starts[starts_here] = starts_here
        return positions - np.maximum.accumulate(segment_starts)


def pack_documents(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    seq_len: int,
    *,
    boundaries: bool = True,
    drop_last: bool = True,
) -> PackedDataset:
    """Tokenise documents and cut them into windows of `seq_len` tokens, in order.

    boundaries: start positions anew at every document of a window and predict nothing across; False makes of each
        window one document, as if `eos_token` were an ordinary token.
    drop_last: leave out what does not fill a window; False fills the last window with padding, for evaluation.

    Raises:
        InputError: seq_len is less than 2, or the tokenizer has no eos_token or no known bytes per token.
        CorpusError: the documents do not fill one window, or hold text that UTF-8 cannot express.
    """
    if seq_len < 2:
        raise InputError(f"seq_len={seq_len} must be at least 2: a token is predicted from one before it.")
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no eos_token to put between documents; set one, or use load_tokenizer.")
    if isinstance(documents, str):
        raise InputError("documents is one text; pass a list of texts, [text] for a single one.")
    byte_lengths = np.array(token_byte_lengths(tokenizer), dtype=np.int64)
    tokens, starts = _tokenise(documents, tokenizer, np.uint16 if byte_lengths.size <= 1 << 16 else np.uint32)
    num_tokens = tokens.size
    if not documents or (drop_last and num_tokens < seq_len):
        raise CorpusError(
            f"The corpus has {num_tokens} tokens in {len(documents)} documents, too few for one window of "
            f"seq_len={seq_len}; use more text or a shorter seq_len."
        )
    if drop_last:
        num_tokens -= num_tokens % seq_len
        tokens, starts = tokens[:num_tokens], starts[starts < num_tokens]
    elif padding := -num_tokens % seq_len:
        tokens = np.append(tokens, np.full(padding, tokenizer.eos_token_id, dtype=tokens.dtype))
        starts = np.append(starts, num_tokens)
    return PackedDataset(
        tokens=tokens,
        document_starts=starts,
        seq_len=seq_len,
        num_tokens=num_tokens,
        byte_lengths=byte_lengths,
        boundaries=boundaries,
    )


def _tokenise(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, dtype: type[np.unsignedinteger]
) -> tuple[np.ndarray, np.ndarray]:
    """All documents behind each other, each with its eos_token, and the index where each begins."""
    encode = document_encoder(tokenizer)
    eos = np.array([tokenizer.eos_token_id], dtype=dtype)
    sizes = [_num_bytes(number, text) for number, text in enumerate(documents)]
    lengths: list[int] = []
    parts = [np.empty(0, dtype=dtype)]
    with progress_bar("Tokenising", total=sum(sizes)) as advance:
        for batch in _batches(sizes):
            encoded = encode([documents[number] for number in batch])
            lengths += (len(ids) + 1 for ids in encoded)
            parts.append(np.concatenate([part.astype(dtype) for ids in encoded for part in (ids, eos)]))
            advance(sum(sizes[number] for number in batch))
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.concatenate(parts), ends - np.array(lengths, dtype=np.int64)


def _num_bytes(number: int, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"Document {number}: character {error.start} is U+{ord(text[error.start]):04X}, half of a surrogate pair, "
            "which UTF-8 cannot express; remove or replace it."
        ) from error


def _batches(sizes: list[int]) -> Iterator[range]:
    """Ranges of documents of about BATCH_BYTES together; a longer document is a batch of its own."""
    first, total = 0, 0
    for number, size in enumerate(sizes):
        if number > first and total + size > BATCH_BYTES:
            yield range(first, number)
            first, total = number, 0
        total += size
    if first < len(sizes):
        yield range(first, len(sizes))
