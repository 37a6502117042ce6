"""Whole models, Hugging Face style. Importing this room makes transformers' Auto classes know them."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .transmamba import TransMambaConfig, TransMambaForCausalLM, TransMambaModel

__all__ = ["TransMambaConfig", "TransMambaForCausalLM", "TransMambaModel"]

AutoConfig.register("transmamba", TransMambaConfig, exist_ok=True)
AutoModel.register(TransMambaConfig, TransMambaModel, exist_ok=True)
AutoModelForCausalLM.register(TransMambaConfig, TransMambaForCausalLM, exist_ok=True)
