"""Whole models, Hugging Face style. Importing this room makes transformers' Auto classes know them."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

from .plain_mamba import PlainMambaConfig, PlainMambaForImageClassification, PlainMambaModel
from .transmamba import TransMambaConfig, TransMambaForCausalLM, TransMambaModel
from .vim import VimConfig, VimForImageClassification, VimModel
from .vision import VisionMambaForImageClassification, split_tokens

__all__ = [
    "PlainMambaConfig",
    "PlainMambaForImageClassification",
    "PlainMambaModel",
    "TransMambaConfig",
    "TransMambaForCausalLM",
    "TransMambaModel",
    "VimConfig",
    "VimForImageClassification",
    "VimModel",
    "VisionMambaForImageClassification",
    "split_tokens",
]

AutoConfig.register("transmamba", TransMambaConfig, exist_ok=True)
AutoModel.register(TransMambaConfig, TransMambaModel, exist_ok=True)
AutoModelForCausalLM.register(TransMambaConfig, TransMambaForCausalLM, exist_ok=True)

for _config, _model, _classifier in (
    (PlainMambaConfig, PlainMambaModel, PlainMambaForImageClassification),
    (VimConfig, VimModel, VimForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)
