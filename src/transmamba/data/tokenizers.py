"""Tokenizers: bytes, any file of the `tokenizers` library, or byte-level BPE trained on the corpus.

Each has an end-of-text token, `eos_token`, which packing puts behind every document.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transmamba.errors import CheckpointError, CorpusError, InputError

__all__ = ["corpus_backend", "document_encoder", "load_tokenizer", "token_byte_lengths"]

END_OF_TEXT = "<|endoftext|>"
# A bare tokenizer.json does not say which of its special tokens ends a text; these do in GPT-2, Llama 3, Llama, Gemma.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
SMALLEST_BPE = 257  # the 256 bytes and the end of text


def load_tokenizer(spec: str, documents: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer that `spec` describes.

    spec: one of
        "bytes": token b is byte b, token 256 the end of text; decoding gives any text back exactly;
        "train:2048": byte-level BPE of at most 2048 entries, trained on `documents`; the same documents give the same
        tokenizer, and few documents fewer entries (`len(tokenizer)` counts them);
        a tokenizer.json, a folder that holds a tokenizer, or the name of one on the Hugging Face Hub.

    A tokenizer without `eos_token` gets one: an end-of-text token that it knows under a usual name, or else a new token
    "<|endoftext|>", which makes the vocabulary one larger. One without `pad_token` pads with `eos_token`. Saved with
    `save_pretrained`, it comes back from `AutoTokenizer` as it was. In text given to the first two kinds, the
    characters "<|endoftext|>" are ordinary text.

    Raises:
        InputError: the spec is malformed or needs documents.
        CorpusError: the documents to train on hold no text.
        CheckpointError: there is no tokenizer of that name, or it cannot be read.
    """
    if spec == "bytes":
        return _wrap(_bytes_backend(), END_OF_TEXT)
    if spec.startswith("train:"):
        return _wrap(_train_backend(spec, documents), END_OF_TEXT)
    path = Path(spec).expanduser()
    if path.is_file():
        return _with_end_of_text(PreTrainedTokenizerFast(tokenizer_object=_read_backend(path)))
    if path.is_dir():
        return _with_end_of_text(_load_folder(path))
    if path.is_absolute() or spec.startswith((".", "~")) or spec.endswith(".json"):
        raise CheckpointError(f"There is no tokenizer {spec!r}: no such file or folder. {_forms()}")
    return _with_end_of_text(_load_pretrained(spec))


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """For each token id the number of bytes of UTF-8 that the token stands for; 0 for special tokens and unused ids.

    For byte-level tokenizers the lengths of the tokens of a text add up to the length of the text, exactly unless the
    tokenizer normalises or adds a space in front. SentencePiece's do up to the space that it may put in front.

    Raises:
        InputError: the tokens do not say which bytes they stand for, as those of WordPiece, which loses white space.
    """
    backend = tokenizer.backend_tokenizer
    vocab = tokenizer.get_vocab()
    components = _component_types(json.loads(backend.to_str()))
    if "ByteLevel" in components:
        length_of: Callable[[str], int] = len  # every character of such a token is one byte
    elif components & {"Metaspace", "ByteFallback"}:
        length_of = _sentencepiece_length
    else:
        raise InputError(
            f"The bytes of a token are known for byte-level and SentencePiece tokenizers, not for one made of "
            f"{', '.join(sorted(components)) or 'words only'}; use 'bytes', 'train:2048' or another tokenizer."
        )
    lengths = [0] * (max(vocab.values()) + 1)
    for token, index in vocab.items():
        lengths[index] = length_of(token)
    for index, added in tokenizer.added_tokens_decoder.items():
        lengths[index] = 0 if added.special else len(added.content.encode())
    for index in tokenizer.all_special_ids:
        lengths[index] = 0
    return lengths


def document_encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[str]], list[np.ndarray]]:
    """A function from texts to their token ids, one array each, for corpora.

    No special token is added, and none is read out of the text: a document that quotes "<|endoftext|>" does not end
    there. Truncation and padding that the tokenizer may be set to do not apply.
    """
    backend = corpus_backend(tokenizer)
    id_of_byte = _ids_of_bytes(backend)
    if id_of_byte is not None:
        return lambda texts: [id_of_byte[np.frombuffer(text.encode(), dtype=np.uint8)] for text in texts]

    def encode(texts: list[str]) -> list[np.ndarray]:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    return encode


def corpus_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend that neither truncates nor pads, and reads no special token out of a text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _bytes_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_characters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend


def _train_backend(spec: str, documents: Sequence[str] | None) -> Tokenizer:
    size = spec.removeprefix("train:")
    if not size.isascii() or not size.isdecimal() or int(size) < SMALLEST_BPE:
        raise InputError(
            f"tokenizer={spec!r}: after 'train:' comes the number of entries, at least {SMALLEST_BPE} (the 256 bytes "
            "and the end of text), as in 'train:2048'."
        )
    if documents is None:
        raise InputError(f"tokenizer={spec!r} is trained on documents, and none were given; pass documents=[...].")
    if not any(documents):
        raise CorpusError(f"tokenizer={spec!r} is trained on documents, and those given hold no text.")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(size),
        min_frequency=2,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=_byte_characters(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(documents, trainer, length=len(documents))
    return backend


def _wrap(backend: Tokenizer, eos_token: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos_token,
        pad_token=eos_token,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )


def _read_backend(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{path} is truncated or not a tokenizer of the `tokenizers` library ({error}); {_forms()}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _load_folder(path: Path) -> PreTrainedTokenizerFast:
    file = path / "tokenizer.json"
    if file.is_file():
        backend = _read_backend(file)  # transformers' own error for a broken file does not name it
        if not (path / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_object=backend)
    return _load_pretrained(str(path))


def _load_pretrained(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"There is no tokenizer {name!r} that can be loaded: {reason} {_forms()}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"The tokenizer {name!r} is a {type(tokenizer).__name__}, without a tokenizer.json; save it as one of the "
            "`tokenizers` library."
        )
    return tokenizer


def _forms() -> str:
    return "A tokenizer is 'bytes', 'train:2048', a tokenizer.json, a folder that holds one, or a name on the Hub."


def _with_end_of_text(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    if tokenizer.eos_token is None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        known = [name for name in END_OF_TEXT_NAMES if name in special]
        tokenizer.add_special_tokens({"eos_token": known[0] if known else END_OF_TEXT})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _byte_characters() -> list[str]:
    """For each byte the character that stands for it in byte-level vocabularies, as in GPT-2.

    A byte that is a visible Latin-1 character is itself; the others take the characters from U+0100 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]


def _ids_of_bytes(backend: Tokenizer) -> np.ndarray | None:
    """For a tokenizer that only maps bytes to tokens, the id of each byte; None for any other.

    A lookup in an array is many times faster than the library, and needs no working memory per token.
    """
    parts = json.loads(backend.to_str())
    added_text = [token for token in parts["added_tokens"] if not token["special"]]
    plain = parts["normalizer"] is None and parts["model"]["type"] == "BPE" and not parts["model"]["merges"]
    split = parts["pre_tokenizer"] or {}
    if not plain or added_text or split.get("type") != "ByteLevel" or split["add_prefix_space"]:
        return None
    ids = [parts["model"]["vocab"].get(char) for char in _byte_characters()]
    return None if None in ids else np.array(ids, dtype=np.uint32)


def _component_types(parts: dict[str, Any]) -> set[str]:
    """The types of a tokenizer's pre-tokenizer and decoder, those inside sequences included."""
    types = set()
    waiting = [parts["pre_tokenizer"], parts["decoder"]]
    while waiting:
        component = waiting.pop()
        if component is None:
            continue
        if component["type"] == "Sequence":
            waiting += component.get("pretokenizers", []) + component.get("decoders", [])
        else:
            types.add(component["type"])
    return types


def _sentencepiece_length(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").encode())
