"""Sentences out of documents: where they end, in which order they come, and that a folder gives them back."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conversion.text_teachers import letter_tokenizer
from transmamba.data import SentenceDataset, make_sentences, pad_texts, split_sentences
from transmamba.errors import CorpusError, InputError

DOCUMENT = """A title
The dog of Mr. Brown ran away. It was found by J. Smith in St. Louis! "Was it he?" asked the old man.
Short one. The river is 3.5 km long (see above). It flows north of the town.
"""


def test_sentences_end_where_they_end() -> None:
    assert split_sentences(DOCUMENT) == [
        "The dog of Mr. Brown ran away.",
        "It was found by J. Smith in St. Louis!",
        '"Was it he?" asked the old man.',
        "The river is 3.5 km long (see above).",
        "It flows north of the town.",
    ]


def documents(count: int = 40) -> list[str]:
    generator = np.random.default_rng(0)
    words = ["cat", "dog", "sees", "a", "tree", "far", "away", "now"]
    texts = []
    for _ in range(count):
        lines = [" ".join(generator.choice(words, size=generator.integers(4, 9))).capitalize() for _ in range(6)]
        texts.append(". ".join(lines) + ".")
    return texts


@pytest.mark.parametrize("passage_share", [0.0, 0.5])
def test_every_sentence_is_in_one_item(passage_share: float) -> None:
    tokenizer = letter_tokenizer()
    made = make_sentences(documents(), tokenizer, max_length=60, passage_share=passage_share)
    ids = [
        tokenizer(sentence, add_special_tokens=False)["input_ids"]
        for d in documents()
        for sentence in split_sentences(d)
    ]
    assert made.tokens.tolist() == [token for row in ids for token in row[:58]]
    assert (len(made) == len(ids)) == (passage_share == 0)
    assert max(len(item["input_ids"]) for item in (made[i] for i in range(len(made)))) <= 60
    first = made[0]["input_ids"].tolist()
    assert (first[0], first[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert made.num_tokens == len(made.tokens) + 2 * len(made)
    assert made.tokens.dtype == np.uint16


def test_long_sentences_are_cut() -> None:
    made = make_sentences(["One two three four five six."], letter_tokenizer(), max_length=8)
    assert len(made[0]["input_ids"]) == 8


def test_batches_hold_texts_of_one_length() -> None:
    made = make_sentences(documents(), letter_tokenizer(), max_length=60, passage_share=0.3)
    arranged = made.arranged(8, seed=1)
    lengths = [len(arranged[i]["input_ids"]) for i in range(len(made))]
    assert sorted(lengths) == sorted(len(made[i]["input_ids"]) for i in range(len(made)))
    batches = [lengths[i : i + 8] for i in range(0, len(lengths) - 7, 8)]
    padded = sum(8 * max(batch) for batch in batches)
    in_order = [len(made[i]["input_ids"]) for i in range(len(made))]
    padded_in_order = sum(8 * max(in_order[i : i + 8]) for i in range(0, len(lengths) - 7, 8))
    assert padded < 0.8 * padded_in_order
    assert [max(batch) for batch in batches] != sorted(max(batch) for batch in batches)  # batches are shuffled
    again, other = made.arranged(8, seed=1), made.arranged(8, seed=2)
    assert all(torch.equal(again[i]["input_ids"], arranged[i]["input_ids"]) for i in range(len(made)))
    assert any(not torch.equal(other[i]["input_ids"], arranged[i]["input_ids"]) for i in range(len(made)))


def test_padding_is_masked_and_every_text_counts() -> None:
    made = make_sentences(documents(4), letter_tokenizer(), max_length=60)
    items = [made[0], made[1], made[2]]
    batch = pad_texts(items)
    assert batch["input_ids"].shape[1] % 8 == 0
    for row, item in enumerate(items):
        assert torch.equal(batch["input_ids"][row][batch["attention_mask"][row] == 1], item["input_ids"])
        assert not batch["input_ids"][row][batch["attention_mask"][row] == 0].any()
    assert batch["labels"].tolist() == [0, 0, 0]


def test_a_folder_gives_them_back(tmp_path: Path) -> None:
    made = make_sentences(documents(), letter_tokenizer(), max_length=60)
    made.part(3, 9).save(tmp_path / "texts")
    assert SentenceDataset.is_stored(tmp_path / "texts")
    loaded = SentenceDataset.load(tmp_path / "texts")
    assert len(loaded) == 6
    assert all(torch.equal(loaded[i]["input_ids"], made[i + 3]["input_ids"]) for i in range(6))
    (tmp_path / "texts" / "tokens.npy").write_bytes(b"")
    with pytest.raises(CorpusError, match="holds no stored sentences"):
        SentenceDataset.load(tmp_path / "texts")


def test_mistakes_are_one_line() -> None:
    with pytest.raises(CorpusError, match="no sentence of four words or more"):
        make_sentences(["Too short."], letter_tokenizer())
    with pytest.raises(InputError, match="max_length=2 must be at least 3"):
        make_sentences(documents(), letter_tokenizer(), max_length=2)
    with pytest.raises(InputError, match="passage_share=2 must be between 0 and 1"):
        make_sentences(documents(), letter_tokenizer(), passage_share=2)
    tokenizer = letter_tokenizer()
    tokenizer.cls_token = None
    with pytest.raises(InputError, match="no cls_token and sep_token"):
        make_sentences(documents(), tokenizer)
