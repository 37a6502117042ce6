"""The sequence-level hybrid language model of arXiv 2503.24067."""

from .configuration import TransMambaConfig
from .initial_values import InitialValue, initial_values
from .modeling import TransMambaForCausalLM, TransMambaModel, TransMambaPreTrainedModel

__all__ = [
    "InitialValue",
    "TransMambaConfig",
    "TransMambaForCausalLM",
    "TransMambaModel",
    "TransMambaPreTrainedModel",
    "initial_values",
]
