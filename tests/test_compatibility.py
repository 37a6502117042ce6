"""A teacher and a student are compared over the ids they share, within the teacher's positions, or not at all."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import GPT2Config, LlamaConfig, Mamba2Config, PreTrainedTokenizerFast

from transmamba import TransMambaConfig
from transmamba.compatibility import allowed_length, check_same_encoding, check_teacher_length, common_vocabulary
from transmamba.errors import InputError

WORDS = ["<end>", "the", "state", "of", "memory"]


def tokenizer_of(words: list[str] | dict[str, int]) -> PreTrainedTokenizerFast:
    vocabulary = words if isinstance(words, dict) else {word: number for number, word in enumerate(words)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<end>")), eos_token="<end>"
    )


def llama(**values: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=len(WORDS), **values)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **values}


def student(vocab_size: int) -> TransMambaConfig:
    return TransMambaConfig(vocab_size=vocab_size, num_hidden_layers=2, trans_points=[0, None])


@pytest.mark.parametrize(("teacher_rows", "student_rows"), [(5, 5), (64, 5), (5, 64), (64, 128)])
def test_padded_heads_are_cut_to_the_tokens_that_both_have(teacher_rows: int, student_rows: int) -> None:
    teacher = LlamaConfig(vocab_size=teacher_rows)
    assert common_vocabulary(tokenizer_of(WORDS), teacher, tokenizer_of(WORDS), student(student_rows)) == 5


def test_an_id_that_neither_uses_is_no_difference() -> None:
    words = {"<end>": 0, "the": 1, "memory": 4}
    assert common_vocabulary(tokenizer_of(words), llama(), tokenizer_of(words), student(8)) == 5


def test_added_tokens_count() -> None:
    longer = tokenizer_of(WORDS)
    longer.add_tokens(["<pad>"])
    assert common_vocabulary(longer, LlamaConfig(vocab_size=6), longer, student(6)) == 6
    with pytest.raises(InputError, match=r"id 5 is no token in the teacher's and '<pad>' in the student's"):
        common_vocabulary(tokenizer_of(WORDS), llama(), longer, student(6))


@pytest.mark.parametrize(
    ("teacher", "pupil", "message"),
    [
        (["<end>", "the", "state", "on", "memory"], WORDS, "id 3 is 'on' in the teacher's and 'of' in the student's"),
        (WORDS, ["<end>", "state", "the", "of", "memory"], "id 1 is 'the' in the teacher's and 'state'"),
        (WORDS, WORDS[:3], "id 3 is 'of' in the teacher's and no token in the student's"),
        (["<end>", "the"], WORDS, "id 2 is no token in the teacher's and 'state' in the student's"),
    ],
)
def test_the_first_id_that_differs_is_named_with_both_tokens(
    teacher: list[str], pupil: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message + ".*; give a teacher and a student with one tokenizer"):
        common_vocabulary(tokenizer_of(teacher), llama(), tokenizer_of(pupil), student(5))


@pytest.mark.parametrize(("teacher_rows", "student_rows", "side"), [(3, 5, "teacher"), (5, 3, "student")])
def test_a_tokenizer_that_is_not_its_models_is_refused(teacher_rows: int, student_rows: int, side: str) -> None:
    with pytest.raises(InputError, match=f"the {side}'s tokenizer has the id 3, 'of', and its model only 3 ids"):
        common_vocabulary(
            tokenizer_of(WORDS), LlamaConfig(vocab_size=teacher_rows), tokenizer_of(WORDS), student(student_rows)
        )


LENGTHS = [
    (llama(max_position_embeddings=48), 48),
    (llama(max_position_embeddings=48, rope_parameters=rope("linear", factor=4.0)), 48),
    (llama(max_position_embeddings=48, rope_parameters=rope("dynamic", factor=2.0)), 48),
    (
        llama(
            max_position_embeddings=48,
            rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=48),
        ),
        192,
    ),
    (
        llama(
            max_position_embeddings=1024,
            rope_parameters=rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        1024,
    ),
    (GPT2Config(n_positions=32), 32),
    (student(5), 8192),
]


@pytest.mark.parametrize(("config", "longest"), LENGTHS)
def test_a_teacher_reads_no_more_than_it_was_made_for(config: Any, longest: int) -> None:
    assert allowed_length(config) == longest
    check_teacher_length(config, longest)
    with pytest.raises(InputError, match=rf"^seq_len={longest + 1} is longer than the {longest} .*; give at most"):
        check_teacher_length(config, longest + 1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (llama(), "that the rotary embedding of this llama model"),
        (LENGTHS[1][0], r"that the rotary embedding \(linear, factor 4\) of this llama model"),
        (GPT2Config(), "that the position embedding of this gpt2 model"),
    ],
)
def test_what_limits_a_teacher_is_named(config: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_teacher_length(config, 10**6)


def test_a_teacher_without_positions_has_no_limit() -> None:
    config = Mamba2Config(num_heads=8, head_dim=16, hidden_size=64)
    assert allowed_length(config) is None
    check_teacher_length(config, 10**9)


def test_a_length_below_1_is_refused() -> None:
    with pytest.raises(InputError, match="seq_len=0 must be at least 1"):
        check_teacher_length(llama(), 0)


def test_rotary_embeddings_that_differ_by_layer_are_read() -> None:
    config = llama(max_position_embeddings=48)
    stretched = rope("yarn", factor=2.0, original_max_position_embeddings=48)
    config.rope_parameters = {"full_attention": stretched, "sliding_attention": rope("default")}
    assert allowed_length(config) == 96


def test_tokenizers_with_one_vocabulary_and_other_merges_are_refused() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    merging, plain = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)))
        for merges in ([("a", "b")], [])
    )
    check_same_encoding(merging, merging, ["abab"])
    check_same_encoding(merging, plain, ["b", "a"])
    with pytest.raises(
        InputError, match=r"the teacher's makes 1 tokens and the student's 2 of a text that begins 'ab'"
    ):
        check_same_encoding(merging, plain, ["b", "ab"])
