"""Counting parameters, and choosing the width of the MLP so that two models have as many."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transmamba.errors import RecipeError
from transmamba.models import TransMambaConfig, TransMambaForCausalLM

__all__ = ["count_parameters", "match_parameters", "new_model"]


def new_model(config: TransMambaConfig | LlamaConfig) -> TransMambaForCausalLM | LlamaForCausalLM:
    """The language model that this config describes, with initial values."""
    return LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else TransMambaForCausalLM(config)


def count_parameters(config: TransMambaConfig | LlamaConfig) -> int:
    """Parameters of the language model that this config describes, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        model = new_model(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


def match_parameters(config: TransMambaConfig, target: int) -> TransMambaConfig:
    """The config with the intermediate_size that brings the number of parameters as near to `target` as it gets.

    A baseline in its standard form has no parameters for the mode it never runs; its MLP becomes wider by as many. One
    step of intermediate_size is three rows of hidden_size in every layer, so the count ends within half of that.

    Raises:
        RecipeError: the model is larger than `target` even with an intermediate_size of 1.
    """
    smallest = count_parameters(_with_mlp(config, 1))
    per_step = count_parameters(_with_mlp(config, 2)) - smallest
    steps = round((target - smallest) / per_step)
    if steps < 0:
        raise RecipeError(
            f"No intermediate_size brings this model down to {target:,} parameters: it has {smallest:,} with an MLP "
            "one wide. Give a larger target, or a smaller hidden_size, vocabulary or number of layers."
        )
    return _with_mlp(config, 1 + steps)


def _with_mlp(config: TransMambaConfig, intermediate_size: int) -> TransMambaConfig:
    changed = copy.deepcopy(config)
    changed.intermediate_size = intermediate_size
    return changed
