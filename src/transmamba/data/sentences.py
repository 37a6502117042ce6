"""Sentences and passages out of documents, as tokens with the encoder's special tokens, batched by length.

An item is one sentence, or a passage: several in a row, up to the longest length. Nothing is packed: a row is one text.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from transmamba.data.tokenizers import document_encoder
from transmamba.errors import CorpusError, InputError
from transmamba.progress import progress_bar

__all__ = ["SentenceDataset", "make_sentences", "pad_texts", "split_sentences"]

# A full stop behind a single letter or a usual short form ends no sentence.
_END = re.compile(
    r"(?<!\b[A-Z]\.)(?<!\b(?:Mr|Dr|St|vs|Jr|Sr|ca|cf|No)\.)(?<!\bMrs\.)(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])"
)
FEWEST_WORDS = 4  # a heading or a remnant has fewer
LENGTHS_TO_ROUND = 8  # rows are padded to a multiple, so that there are few shapes
BATCHES_TO_SORT = 50  # among so many batches at a time, texts of one length come together
SENTENCES_AT_ONCE = 1 << 14  # tokenised together; bounds the library's working memory
FILES = {"tokens": "tokens.npy", "lengths": "lengths.npy", "about": "sentences.json"}


class SentenceDataset(Dataset[dict[str, Tensor]]):
    """Texts as token ids, in an order that has texts of about one length in a batch.

    An item holds input_ids (its tokens,), int64, with `first` before and `last` behind. `pad_texts` stacks them.

    Attributes:
        tokens: of all texts, without special ones, uint16 or uint32. lengths: tokens of each text, int64.
        first, last: the special tokens' ids, such as [CLS] and [SEP]. vocab_size: of the tokenizer.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, *, first: int, last: int, vocab_size: int) -> None:
        if len(tokens) != int(lengths.sum()):
            raise InputError(f"{len(tokens)} tokens do not make texts of {int(lengths.sum())} tokens in all.")
        self.tokens = tokens
        self.lengths = lengths.astype(np.int64)
        self.first = first
        self.last = last
        self.vocab_size = vocab_size
        self._starts = np.concatenate([[0], self.lengths.cumsum()])
        self._order = np.arange(len(lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        at = self._order[index]
        ids = np.empty(self.lengths[at] + 2, dtype=np.int64)
        ids[0], ids[-1] = self.first, self.last
        ids[1:-1] = self.tokens[self._starts[at] : self._starts[at + 1]]
        return {"input_ids": torch.from_numpy(ids)}

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts, special ones included."""
        return int(self.lengths.sum()) + 2 * len(self)

    def arranged(self, batch_size: int, seed: int) -> "SentenceDataset":
        """The same texts, shuffled so that consecutive batches of this size hold texts of about one length."""
        generator = np.random.default_rng(seed)
        order = generator.permutation(len(self))
        block = batch_size * BATCHES_TO_SORT
        blocks = [order[start : start + block] for start in range(0, len(order), block)]
        batches = [
            part[start : start + batch_size]
            for part in (one[np.argsort(self.lengths[one], kind="stable")] for one in blocks)
            for start in range(0, len(part), batch_size)
        ]
        whole = [batch for batch in batches if len(batch) == batch_size]
        rest = [batch for batch in batches if len(batch) < batch_size]
        shuffled = [whole[at] for at in generator.permutation(len(whole))]
        made = SentenceDataset(self.tokens, self.lengths, first=self.first, last=self.last, vocab_size=self.vocab_size)
        made._order = np.concatenate([*shuffled, *rest]) if len(self) else self._order
        return made

    def part(self, start: int, stop: int) -> "SentenceDataset":
        """The texts from start to stop, in the order in which they were read."""
        tokens = self.tokens[self._starts[start] : self._starts[min(stop, len(self))]]
        return SentenceDataset(
            tokens, self.lengths[start:stop], first=self.first, last=self.last, vocab_size=self.vocab_size
        )

    def save(self, folder: str | Path) -> None:
        """Write the texts into a folder, for `load`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        np.save(path / FILES["tokens"], self.tokens)
        np.save(path / FILES["lengths"], self.lengths.astype(np.uint16 if self.lengths.max() < 2**16 else np.uint32))
        about = {"first": self.first, "last": self.last, "vocab_size": self.vocab_size}
        (path / FILES["about"]).write_text(json.dumps(about) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | Path) -> "SentenceDataset":
        """The texts that `save` wrote.

        Raises:
            CorpusError: a file is missing, truncated or damaged.
        """
        path = Path(folder)
        try:
            about = json.loads((path / FILES["about"]).read_text(encoding="utf-8"))
            tokens, lengths = (np.load(path / FILES[name], allow_pickle=False) for name in ("tokens", "lengths"))
            return SentenceDataset(
                tokens,
                lengths.astype(np.int64),
                first=int(about["first"]),
                last=int(about["last"]),
                vocab_size=int(about["vocab_size"]),
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise CorpusError(
                f"{folder} holds no stored sentences ({reason}); write them anew with SentenceDataset.save."
            ) from error

    @staticmethod
    def is_stored(folder: str | Path) -> bool:
        """Whether a folder holds what `save` writes."""
        return (Path(folder) / FILES["about"]).is_file()


def make_sentences(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int = 128,
    passage_share: float = 0.1,
    seed: int = 0,
) -> SentenceDataset:
    """Cut documents into sentences and tokenise them; what is longer than max_length, special tokens included, is cut.

    passage_share: of the items; a passage takes the sentences that follow, as long as they fit. Every sentence is in
    one item. Sentences of fewer than four words are left out.

    Raises:
        CorpusError: there is no sentence.
        InputError: a number is out of range, or the tokenizer has no special tokens for the ends of a text.
    """
    if max_length < 3:
        raise InputError(f"max_length={max_length} must be at least 3: two special tokens and one more.")
    if not 0 <= passage_share <= 1:
        raise InputError(f"passage_share={passage_share} must be between 0 and 1.")
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if first is None or last is None:
        raise InputError("the tokenizer has no cls_token and sep_token; give one of a BERT-type encoder.")
    encode = document_encoder(tokenizer)
    generator = np.random.default_rng(seed)
    vocab_size = len(tokenizer)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    room = max_length - 2
    items: list[np.ndarray] = []
    with progress_bar("Cutting sentences", total=len(documents)) as advance:
        for document in documents:
            sentences = split_sentences(document)
            for start in range(0, len(sentences), SENTENCES_AT_ONCE):
                rows = [row[:room].astype(dtype) for row in encode(sentences[start : start + SENTENCES_AT_ONCE])]
                items += _items([row for row in rows if len(row)], room, passage_share, generator)
            advance(1)
    if not items:
        raise CorpusError("The text holds no sentence of four words or more; give another text.")
    lengths = np.array([len(item) for item in items], dtype=np.int64)
    return SentenceDataset(np.concatenate(items), lengths, first=int(first), last=int(last), vocab_size=vocab_size)


def split_sentences(document: str) -> list[str]:
    """The sentences of a document, line by line, of four words or more."""
    found = [sentence.strip() for line in document.splitlines() for sentence in _END.split(line)]
    return [sentence for sentence in found if len(sentence.split()) >= FEWEST_WORDS]


def pad_texts(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack texts, padded with 0 to a common length: input_ids, attention_mask (texts, length) and labels (texts,).

    labels are 0, one for each text: by them the Trainer counts the texts of a step.
    """
    rows = [item["input_ids"] for item in items]
    lengths = torch.tensor([len(row) for row in rows])
    stacked = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    input_ids = torch.nn.functional.pad(stacked, (0, -stacked.shape[1] % LENGTHS_TO_ROUND))
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": torch.zeros(len(rows), dtype=torch.int64)}


def _items(
    rows: Sequence[np.ndarray], room: int, passage_share: float, generator: np.random.Generator
) -> list[np.ndarray]:
    items, at = [], 0
    while at < len(rows):
        end, total = at + 1, len(rows[at])
        if generator.random() < passage_share:
            while end < len(rows) and total + len(rows[end]) <= room:
                total += len(rows[end])
                end += 1
        items.append(np.concatenate(rows[at:end]))
        at = end
    return items
