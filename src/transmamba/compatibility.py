"""Whether a teacher and a student can be compared at all: their token ids mean the same, and the text is not too long.

This file asks tokenizers and configurations only; no model is loaded for it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transmamba.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

__all__ = ["allowed_length", "check_same_encoding", "check_teacher_length", "common_vocabulary"]

CHECKED_CHARACTERS = 2000  # of each of the first documents, encoded by both tokenizers
CHECKED_DOCUMENTS = 8


def common_vocabulary(
    teacher_tokenizer: "PreTrainedTokenizerBase",
    teacher_config: "PreTrainedConfig",
    student_tokenizer: "PreTrainedTokenizerBase",
    student_config: "PreTrainedConfig",
) -> int:
    """The number of leading token ids that stand for the same tokens in both models.

    Compare logits[..., :number]. Heads are often padded beyond the last token, to a multiple of 64 or more, and those
    rows stand for nothing; so the heads may have different sizes, the tokenizers may not differ. An id that neither
    uses is no difference.

    Raises:
        InputError: an id stands for another token, or for none, in one of them; or a tokenizer has ids that its own
            model does not.
    """
    teacher = _tokens_by_id("teacher", teacher_tokenizer, teacher_config)
    student = _tokens_by_id("student", student_tokenizer, student_config)
    used = teacher.keys() | student.keys()
    for index in sorted(used):
        if teacher.get(index) != student.get(index):
            raise InputError(
                f"the vocabularies differ: id {index} is {_in_words(teacher.get(index))} in the teacher's and "
                f"{_in_words(student.get(index))} in the student's; give a teacher and a student with one tokenizer."
            )
    return max(used) + 1


def check_same_encoding(
    teacher_tokenizer: "PreTrainedTokenizerBase",
    student_tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
) -> None:
    """Refuse two tokenizers that make different token ids of the beginnings of some texts, as other merges would.

    Raises:
        InputError: they differ, with the first text on which they do.
    """
    for text in texts[:CHECKED_DOCUMENTS]:
        part = text[:CHECKED_CHARACTERS]
        teacher, student = (
            tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            for tokenizer in (teacher_tokenizer, student_tokenizer)
        )
        if teacher != student:
            raise InputError(
                f"the tokenizers differ: the teacher's makes {len(teacher)} tokens and the student's {len(student)} of "
                f"a text that begins {part[:30]!r}; give a teacher and a student with one tokenizer."
            )


def check_teacher_length(config: "PreTrainedConfig", seq_len: int) -> None:
    """Refuse windows of seq_len tokens that are longer than a teacher of this configuration can read.

    Raises:
        InputError: seq_len is below 1, or beyond allowed_length(config).
    """
    if seq_len < 1:
        raise InputError(f"seq_len={seq_len} must be at least 1.")
    allowed = allowed_length(config)
    if allowed is not None and seq_len > allowed:
        raise InputError(
            f"seq_len={seq_len} is longer than the {allowed} positions that {_positions_in_words(config)} of this "
            f"{config.model_type} model was made for; give at most {allowed}."
        )


def allowed_length(config: "PreTrainedConfig") -> int | None:
    """The number of positions that a model of this configuration was made for; None where nothing limits it.

    It is max_position_embeddings, or what a scaled rotary embedding stretches the original length to where the
    configuration gives that length and is more: YaRN's configurations keep the original one in both fields.
    """
    text = config.get_text_config()
    longest: int | None = getattr(text, "max_position_embeddings", None)
    rope = _rope(config)
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if longest is None or original is None or factor is None:
        return longest
    return max(longest, int(original * factor))


def _tokens_by_id(side: str, tokenizer: "PreTrainedTokenizerBase", config: "PreTrainedConfig") -> dict[int, str]:
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    rows = config.get_text_config().vocab_size
    if not tokens:
        raise InputError(f"the {side}'s tokenizer has no entries; save its tokenizer beside the model.")
    beyond = min((index for index in tokens if index >= rows), default=None)
    if beyond is not None:
        raise InputError(
            f"the {side}'s tokenizer has the id {beyond}, {_in_words(tokens[beyond])}, and its model only {rows} ids; "
            "they do not belong together, or the model's embeddings have to be resized first."
        )
    return tokens


def _in_words(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _rope(config: "PreTrainedConfig") -> dict[str, Any]:
    """The parameters of the rotary embedding; of the first kind of layer where there are several."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return dict(parameters)
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)]
    return dict(kinds[0]) if kinds else {}


def _positions_in_words(config: "PreTrainedConfig") -> str:
    rope = _rope(config)
    if not rope:
        return "the position embedding"
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    details = "" if kind == "default" else f" ({kind}, factor {factor:g})" if factor is not None else f" ({kind})"
    return f"the rotary embedding{details}"
