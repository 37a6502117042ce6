"""Tiny language models that hide nothing, and documents to run them on."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.helpers import DEVICE, relative_rms_error
from transmamba import TransMambaConfig, TransMambaForCausalLM

VOCAB_SIZE = 61
TRANS_POINT = 7  # that of the tiny model's middle layer

# What the matrix of executions runs over: each is one choice away from the tiny model.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no convolution": {"conv_kernel": 0},
    "normed modes": {"mode_norm": True},
    "rope in both modes": {"ssm_rope": True},
    "no gate": {"use_gate": False},
    "all heads have keys": {"num_key_value_heads": 4},
    "shared states": {"num_state_heads": 2},
    "one key head": {"num_key_value_heads": 1, "num_state_heads": 2},
    "every layer switches": {"trans_points": [5, TRANS_POINT, 9]},
    "standard form": {"mixer_form": "standard", "trans_points": [0, None, 0]},
    "tied": {"tie_word_embeddings": True},
    "no MLP": {"intermediate_size": 0},
    "scaled rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def tiny_config(**changes: Any) -> TransMambaConfig:
    """Three layers: an SSM, one that switches at TRANS_POINT, attention; two query heads to a key head."""
    return TransMambaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "trans_points": [0, TRANS_POINT, None],
            "initializer_range": 0.3,
            "dt_min": 0.05,
            "dt_max": 0.5,
        }
        | changes
    )


def tiny_model(dtype: torch.dtype = torch.float32, **changes: Any) -> TransMambaForCausalLM:
    """A seeded model in evaluation mode. No parameter keeps a value, 0 or 1, at which it would not show."""
    torch.manual_seed(1)
    model = TransMambaForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", ".D", "norm.weight")):
                parameter.normal_(1.0, 0.5)
    return model.to(DEVICE, dtype).eval()


@cache
def shared_model(variant: str, dtype: torch.dtype) -> TransMambaForCausalLM:
    """The tiny model of a variant, for tests that leave it as it is."""
    return tiny_model(dtype, **VARIANTS[variant]).requires_grad_(False)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids without 0, which is left for padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB_SIZE, shape, generator=generator).to(DEVICE)


def documents(*lengths: int) -> list[Tensor]:
    """A document of each length, (length,), all different."""
    return [tokens(length, seed=number) for number, length in enumerate(lengths)]


def worst_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest relative error over the documents, and over their last tokens alone."""
    errors = [relative_rms_error(a, b) for a, b in zip(found, exact, strict=True)]
    last = [relative_rms_error(a[-1], b[-1]) for a, b in zip(found, exact, strict=True) if len(b)]
    return max(errors + last)
