"""The families of checkpoints that can be converted: for each, the student's configuration and the table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from transmamba.conversion.plan import Move
from transmamba.conversion.sources.gpt2 import IGNORED_OF_GPT2, gpt2_choices, gpt2_moves
from transmamba.conversion.sources.llama import IGNORED_OF_LLAMA, llama_choices, llama_moves
from transmamba.errors import CheckpointError

__all__ = ["FAMILIES", "Family", "find_family"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one model_type is read.

    prefix: of the backbone's tensors; checkpoints of the bare backbone leave it out. ignored: endings (regular
    expressions) of tensors that are not parameters, with the reason. choices: fields of TransMambaConfig, and notes for
    the user. moves: the table.
    """

    model_type: str
    prefix: str
    ignored: tuple[tuple[str, str], ...]
    choices: Callable[[PreTrainedConfig, int | None], tuple[dict[str, Any], tuple[str, ...]]]
    moves: Callable[[PreTrainedConfig], list[Move]]


def find_family(name: str, model_type: str | None) -> Family:
    """The family of a model_type.

    Raises:
        CheckpointError: it is not known.
    """
    if model_type == "transmamba":
        raise CheckpointError(f"{name} is a TransMamba already; set_trans_points changes its schedule at any time.")
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{name} is a model of type {model_type!r}, which cannot be converted; known are "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def _llama_like(model_type: str) -> Family:
    return Family(
        model_type=model_type, prefix="model.", ignored=IGNORED_OF_LLAMA, choices=llama_choices, moves=llama_moves
    )


FAMILIES: dict[str, Family] = {
    **{name: _llama_like(name) for name in ("llama", "mistral", "qwen2", "qwen3", "smollm3")},
    "gpt2": Family(
        model_type="gpt2", prefix="transformer.", ignored=IGNORED_OF_GPT2, choices=gpt2_choices, moves=gpt2_moves
    ),
}
