"""Tokenizers: exact round trips, an end of text, bytes per token, saving."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers import data_folder
from transmamba.data import load_tokenizer, token_byte_lengths
from transmamba.data.tokenizers import document_encoder
from transmamba.errors import CheckpointError, CorpusError, InputError

DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 20,
    "def fox(dog):\n    return [dog for dog in dogs if dog.lazy]\n" * 20,
]
UNKIND = [
    "",
    " ",
    "a .b , c 's\t\n\n  d ",
    "naïve 文字 😀 \u0301",
    "\x00\x7f\u0080\u00ad",
    "<|endoftext|>",
    "a<|endoftext|>b",
]

BYTES = load_tokenizer("bytes")
TRAINED = load_tokenizer("train:300", DOCUMENTS)


def test_a_byte_is_its_own_token() -> None:
    text = "Aé\n😀"
    assert BYTES.encode(text) == list(text.encode())
    assert len(BYTES) == 257
    assert BYTES.eos_token_id == BYTES.pad_token_id == 256


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])
@pytest.mark.parametrize("text", UNKIND)
def test_unkind_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_comes_back_and_its_bytes_add_up(text: str) -> None:
    for tokenizer in (BYTES, TRAINED):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        lengths = token_byte_lengths(tokenizer)
        assert sum(lengths[index] for index in ids) == len(text.encode())


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])
def test_every_token_has_a_length(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = token_byte_lengths(tokenizer)
    assert len(lengths) == len(tokenizer)
    assert [index for index, length in enumerate(lengths) if length == 0] == [tokenizer.eos_token_id]


def test_training_again_gives_the_same_tokenizer() -> None:
    again = load_tokenizer("train:300", DOCUMENTS)
    assert again.backend_tokenizer.to_str() == TRAINED.backend_tokenizer.to_str()
    assert len(again) == 300
    assert again.eos_token_id == again.pad_token_id == 0


def test_a_trained_tokenizer_shortens_its_own_text() -> None:
    for document in DOCUMENTS:
        assert len(TRAINED.encode(document)) < len(document.encode())


def test_a_small_corpus_gives_fewer_entries_than_asked() -> None:
    assert 257 <= len(load_tokenizer("train:5000", ["one text"])) < 300


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])
def test_a_saved_tokenizer_comes_back_as_it_was(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.model_input_names == tokenizer.model_input_names == ["input_ids", "attention_mask"]
        assert len(again) == len(tokenizer)
        for text in UNKIND:
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(again.encode(text)) == text


@pytest.mark.parametrize("spec", ["train:256", "train:", "train:many", "train:-5", "train:3e4"])
def test_an_impossible_size_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match=rf"tokenizer='{spec}'.*at least 257"):
        load_tokenizer(spec, DOCUMENTS)


def test_training_needs_documents() -> None:
    with pytest.raises(InputError, match="'train:300' is trained on documents, and none were given"):
        load_tokenizer("train:300")
    with pytest.raises(CorpusError, match=r"'train:300' .* hold no text"):
        load_tokenizer("train:300", ["", ""])


def save_backend(path: Path, special: list[str]) -> Tokenizer:
    """Write a tokenizer.json of the letters a to c, with these special tokens behind them."""
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.save(str(path))
    return backend


@pytest.mark.parametrize(
    ("special", "eos", "size"),
    [
        (["<|endoftext|>"], "<|endoftext|>", 4),
        (["<s>", "</s>", "<pad>"], "</s>", 6),
        (["<|begin_of_text|>", "<|end_of_text|>"], "<|end_of_text|>", 5),
        (["[CLS]", "[SEP]"], "<|endoftext|>", 6),
        ([], "<|endoftext|>", 4),
    ],
)
def test_a_tokenizer_file_finds_or_gets_its_end_of_text(
    tmp_path: Path, special: list[str], eos: str, size: int
) -> None:
    save_backend(tmp_path / "tokenizer.json", special)
    for spec in (tmp_path / "tokenizer.json", tmp_path):
        tokenizer = load_tokenizer(str(spec))
        assert tokenizer.eos_token == tokenizer.pad_token == eos
        assert len(tokenizer) == size
        assert tokenizer.encode("abc") == [0, 1, 2]
        assert token_byte_lengths(tokenizer) == [1, 1, 1] + [0] * (size - 3)


def test_a_saved_end_of_text_and_padding_are_kept(tmp_path: Path) -> None:
    backend = save_backend(tmp_path / "other.json", ["<end>", "<pad>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<end>", "<pad>")


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0", "added', b'{"model": "gpt2"}', b"\xff\xfe"])
def test_a_broken_tokenizer_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    for spec in (tmp_path / "tokenizer.json", tmp_path):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is truncated or not a tokenizer"):
            load_tokenizer(str(spec))


@pytest.mark.parametrize("spec", ["owner/no-such-tokenizer", "./nowhere", "/no/such/folder", "bits", "tokenizer.json"])
def test_a_missing_tokenizer_is_refused_with_the_ways_out(spec: str) -> None:
    with pytest.raises(CheckpointError, match=rf"There is no tokenizer '{spec}'.*'bytes', 'train:2048'"):
        load_tokenizer(spec)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="There is no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_sentencepiece_tokens_count_their_bytes() -> None:
    vocab = {"<0xC3>": 0, "<0xA9>": 1, "▁": 2, "a": 3, "▁a": 4, "語": 5, "<unk>": 6, "<0xAB": 7}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    lengths = token_byte_lengths(tokenizer)
    assert lengths == [1, 1, 1, 1, 2, 3, 0, 5, 0]
    text = " aé a語"
    assert sum(lengths[index] for index in tokenizer.encode(text)) == len(text.encode())


def test_added_words_count_their_bytes_and_special_ones_none() -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens(["façade"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert token_byte_lengths(tokenizer)[256:] == [0, 7, 0]


def test_a_tokenizer_that_loses_white_space_has_no_bytes_per_token() -> None:
    backend = Tokenizer(models.WordPiece(vocab={"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="not for one made of BertPreTokenizer, WordPiece"):
        token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED], ids=["bytes", "trained"])
def test_documents_are_encoded_as_by_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = document_encoder(tokenizer)([*UNKIND, *DOCUMENTS])
    assert [ids.tolist() for ids in encoded] == [tokenizer.encode(text) for text in [*UNKIND, *DOCUMENTS]]


def test_only_plain_bytes_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    added = load_tokenizer("bytes")
    added.add_tokens(["fox"])
    prefixed = load_tokenizer("bytes")
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    lowered = load_tokenizer("bytes")
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    for tokenizer, text in ((added, "the fox"), (prefixed, "the fox"), (lowered, "The Fox")):
        (ids,) = document_encoder(tokenizer)([text])
        assert ids.tolist() == tokenizer.encode(text)
        assert ids.tolist() != list(text.encode())


@pytest.mark.parametrize("spec", ["bytes", "train:300"])
def test_documents_are_neither_truncated_nor_padded_nor_read_for_special_tokens(spec: str) -> None:
    tokenizer = load_tokenizer(spec, DOCUMENTS)
    texts = ["a z", "<|endoftext|>", ""]
    whole = [tokenizer.encode(text) for text in texts]
    tokenizer.split_special_tokens = False
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    tokenizer.backend_tokenizer.enable_padding(length=5)
    assert [ids.tolist() for ids in document_encoder(tokenizer)(texts)] == whole
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.eos_token_id]


@pytest.mark.data
def test_the_wikipedia_tokenizer_counts_bytes() -> None:
    tokenizer = load_tokenizer(str(data_folder() / "tokenizers" / "wiki16k.json"))
    text = "".join(DOCUMENTS) + " naïve 文字 😀"
    assert tokenizer.eos_token == "<|endoftext|>"
    lengths = token_byte_lengths(tokenizer)
    assert sum(lengths[index] for index in tokenizer.encode(text)) == len(text.encode())


@pytest.mark.data
def test_the_teachers_tokenizer_loads_from_its_folder() -> None:
    tokenizer = load_tokenizer(str(data_folder() / "teachers" / "llama_wiki_31m"))
    assert tokenizer.eos_token == "<|endoftext|>"
    assert len(token_byte_lengths(tokenizer)) == 16384
