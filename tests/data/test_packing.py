"""Packing: nothing is lost, every document starts anew, bytes are those of the predicted tokens."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, default_data_collator

from transmamba.data import IGNORE_INDEX, PackedDataset, load_tokenizer, pack_documents, packing
from transmamba.errors import CorpusError, InputError

EOS = 256
BYTES = load_tokenizer("bytes")
TRAINED = load_tokenizer("train:300", ["the fox and the dog and the fox " * 20])
CORPORA = st.lists(
    st.text(max_size=30) | st.just("<|endoftext|>") | st.just("the fox and the dog"), min_size=1, max_size=8
)
SEQ_LENS = st.integers(2, 40)


def expected_windows(
    documents: list[str], tokenizer: PreTrainedTokenizerFast, seq_len: int, boundaries: bool
) -> list[list[tuple[int, int, int]]]:
    """(input_ids, position_ids, labels) of every token of every window, written out; the last window may be short."""
    stream = []
    for document in documents:
        ids = [*tokenizer.encode(document), tokenizer.eos_token_id]
        stream += [(token, place == 0) for place, token in enumerate(ids)]
    windows = []
    for start in range(0, len(stream), seq_len):
        window: list[tuple[int, int, int]] = []
        for token, is_first in stream[start : start + seq_len]:
            position = 0 if not window or (is_first and boundaries) else window[-1][1] + 1
            window.append((token, position, IGNORE_INDEX if position == 0 else token))
        windows.append(window)
    return windows


def rows(item: dict[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    columns = [item[name].tolist() for name in ("input_ids", "position_ids", "labels")]
    return list(zip(*columns, strict=True))


def pack(documents: list[str], seq_len: int, *, boundaries: bool = True, drop_last: bool = False) -> PackedDataset:
    return pack_documents(documents, BYTES, seq_len, boundaries=boundaries, drop_last=drop_last)


@settings(deadline=None, max_examples=200)
@given(CORPORA, SEQ_LENS, st.booleans(), st.sampled_from([BYTES, TRAINED]))
def test_windows_are_those_written_out(
    documents: list[str], seq_len: int, boundaries: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    dataset = pack_documents(documents, tokenizer, seq_len, boundaries=boundaries, drop_last=False)
    expected = expected_windows(documents, tokenizer, seq_len, boundaries)
    assert len(dataset) == len(expected)
    assert dataset.num_tokens == sum(map(len, expected))
    for item, window in zip(dataset, expected, strict=True):
        assert rows(item)[: len(window)] == window
        assert all(tensor.shape == (seq_len,) and tensor.dtype == torch.int64 for tensor in item.values())


@settings(deadline=None)
@given(CORPORA, SEQ_LENS)
def test_all_windows_together_are_all_documents_in_order(documents: list[str], seq_len: int) -> None:
    dataset = pack(documents, seq_len)
    ids = torch.cat([item["input_ids"] for item in dataset])[: dataset.num_tokens].tolist()
    assert ids == [token for document in documents for token in (*document.encode(), EOS)]


@settings(deadline=None)
@given(CORPORA, SEQ_LENS, st.booleans())
def test_the_last_window_is_dropped_or_filled(documents: list[str], seq_len: int, boundaries: bool) -> None:
    filled = pack(documents, seq_len, boundaries=boundaries)
    *full, last = filled
    used = filled.num_tokens - len(full) * seq_len
    assert 1 <= used <= seq_len
    assert last["input_ids"][used:].tolist() == [EOS] * (seq_len - used)
    assert last["labels"][used:].tolist() == [IGNORE_INDEX] * (seq_len - used)
    first = 0 if boundaries else used
    assert last["position_ids"][used:].tolist() == list(range(first, first + seq_len - used))
    if used == seq_len:
        full.append(last)
    if not full:
        with pytest.raises(CorpusError, match=f"seq_len={seq_len}"):
            pack(documents, seq_len, boundaries=boundaries, drop_last=True)
        return
    dropped = pack(documents, seq_len, boundaries=boundaries, drop_last=True)
    assert dropped.num_tokens == len(full) * seq_len
    assert [rows(item) for item in dropped] == [rows(item) for item in full]


@settings(deadline=None)
@given(CORPORA, SEQ_LENS, st.booleans(), st.booleans())
@example(["ab", "cd"], 3, True, False)
def test_bytes_are_those_of_the_predicted_text(
    documents: list[str], seq_len: int, boundaries: bool, drop_last: bool
) -> None:
    if drop_last and sum(len(text.encode()) + 1 for text in documents) < seq_len:
        return
    dataset = pack(documents, seq_len, boundaries=boundaries, drop_last=drop_last)
    predicted = [
        sum(1 for label in item["labels"][1:].tolist() if label not in (IGNORE_INDEX, EOS)) for item in dataset
    ]
    assert [dataset.num_bytes(index) for index in range(len(dataset))] == predicted
    assert dataset.num_bytes() == sum(predicted)


def test_bytes_are_counted_alike_in_one_block_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = pack_documents(["the fox and the dog, naïve 文字"] * 50, TRAINED, 16)
    assert dataset.num_bytes() == sum(dataset.num_bytes(index) for index in range(len(dataset)))
    at_once = dataset.num_bytes()
    monkeypatch.setattr(packing, "COUNT_TOKENS", 7)
    assert dataset.num_bytes() == at_once


def test_documents_start_anew_inside_a_window() -> None:
    dataset = pack(["abc", "", "d"], 8)
    assert len(dataset) == 1
    assert dataset[0]["input_ids"].tolist() == [*b"abc", EOS, EOS, *b"d", EOS, EOS]
    assert dataset[0]["position_ids"].tolist() == [0, 1, 2, 3, 0, 0, 1, 0]
    assert dataset[0]["labels"].tolist() == [-100, *b"bc", EOS, -100, -100, EOS, -100]
    assert dataset.num_tokens == 7
    assert dataset.num_bytes() == 2


def test_without_boundaries_a_window_is_one_document() -> None:
    dataset = pack(["abc", "d"], 6, boundaries=False)
    assert dataset[0]["position_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    assert dataset[0]["labels"].tolist() == [-100, *b"bc", EOS, *b"d", EOS]
    assert dataset.num_bytes() == 3


def test_a_document_cut_by_a_window_goes_on_from_position_zero() -> None:
    dataset = pack(["abcdefg"], 4)
    assert dataset[1]["input_ids"].tolist() == [*b"efg", EOS]
    assert dataset[1]["position_ids"].tolist() == [0, 1, 2, 3]
    assert dataset[1]["labels"].tolist() == [-100, *b"fg", EOS]


def test_a_quoted_end_of_text_does_not_end_a_document() -> None:
    dataset = pack(["a<|endoftext|>b"], 16)
    assert dataset[0]["position_ids"].tolist() == list(range(16))
    assert dataset[0]["input_ids"].tolist().count(EOS) == 1


def test_batches_do_not_change_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["the fox " * count for count in (1, 40, 3, 0, 7, 2)]
    at_once = pack_documents(documents, TRAINED, 8)
    monkeypatch.setattr(packing, "BATCH_BYTES", 64)
    in_batches = pack_documents(documents, TRAINED, 8)
    assert np.array_equal(at_once.tokens, in_batches.tokens)
    assert np.array_equal(at_once.document_starts, in_batches.document_starts)


def test_tokens_take_two_bytes_unless_the_vocabulary_needs_four() -> None:
    assert pack(["abc"], 4).tokens.dtype == np.uint16
    large = load_tokenizer("bytes")
    large.add_tokens([f"[{number}]" for number in range(1 << 16)])
    dataset = pack_documents(["a[65535]"], large, 3)
    assert dataset.tokens.dtype == np.uint32
    assert dataset[0]["input_ids"].tolist() == [ord("a"), 257 + 65535, EOS]
    assert dataset.num_bytes() == len("[65535]")


def test_items_stack_into_a_batch() -> None:
    dataset = pack(["abcdefgh"] * 4, 4)
    by_transformers = default_data_collator([dataset[0], dataset[1]])
    (by_torch,) = DataLoader(torch.utils.data.Subset(dataset, [0, 1]), batch_size=2)
    for batch in (by_transformers, by_torch):
        assert set(batch) == {"input_ids", "labels", "position_ids"}
        for name, tensor in batch.items():
            assert torch.equal(tensor, torch.stack([dataset[0][name], dataset[1][name]]))


def test_indices_are_those_of_a_sequence() -> None:
    dataset = pack(["abcdefgh"], 3)
    assert rows(dataset[-1]) == rows(dataset[2])
    for index in (3, -4):
        with pytest.raises(IndexError):
            dataset[index]


def test_an_item_does_not_share_memory_with_the_data_set() -> None:
    dataset = pack(["abcdefgh"], 3)
    dataset[0]["input_ids"].zero_()
    assert dataset[0]["input_ids"].tolist() == list(b"abc")


def test_a_data_set_goes_to_worker_processes() -> None:
    dataset = pack(["abc", "defgh"], 4)
    again = pickle.loads(pickle.dumps(dataset))
    assert [rows(item) for item in again] == [rows(item) for item in dataset]


@pytest.mark.parametrize(("documents", "words"), [([], "0 tokens in 0 documents"), (["abc"], "4 tokens in 1 document")])
def test_a_corpus_too_small_for_one_window_is_refused(documents: list[str], words: str) -> None:
    with pytest.raises(CorpusError, match=rf"{words}.*too few for one window of seq_len=5.*shorter seq_len"):
        pack(documents, 5, drop_last=True)


def test_no_documents_are_refused_even_with_padding() -> None:
    with pytest.raises(CorpusError, match="0 tokens in 0 documents"):
        pack([], 5)


@pytest.mark.parametrize("seq_len", [1, 0, -3])
def test_a_window_without_anything_to_predict_is_refused(seq_len: int) -> None:
    with pytest.raises(InputError, match=f"seq_len={seq_len} must be at least 2"):
        pack(["abc"], seq_len)


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BYTES.backend_tokenizer)
    with pytest.raises(InputError, match="no eos_token"):
        pack_documents(["abc"], tokenizer, 4)


def test_a_bare_text_is_refused() -> None:
    with pytest.raises(InputError, match="documents is one text"):
        pack_documents("abcdef", BYTES, 4)


def test_text_that_utf8_cannot_express_is_named() -> None:
    with pytest.raises(CorpusError, match=r"Document 1: character 2 is U\+DC80"):
        pack(["good", "ba\udc80d"], 4)
