"""Tiny random Transformers of every family that can be converted; no parameter has a value that would not show."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 257
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# name: (model_type, what differs from the tiny model)
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama with a head of its own": ("llama", {"tie_word_embeddings": False}),
    "Llama with all key heads": ("llama", {"num_key_value_heads": 4}),
    "Llama with one key head": ("llama", {"num_key_value_heads": 1}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama with wide heads": ("llama", {"head_dim": 16}),
    "Llama 3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "Llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}),
    "Llama, dynamic rope": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
            "max_position_embeddings": 24,
        },
    ),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mistral whose window never binds": ("mistral", {"sliding_window": 128}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "Qwen3 with biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "GPT-2": ("gpt2", {}),
    "GPT-2 with a head of its own": ("gpt2", {"tie_word_embeddings": False, "n_inner": 40}),
}


def tiny_source(name: str, **changes: Any) -> PreTrainedModel:
    """A seeded model in evaluation mode, fp32."""
    model_type, differences = SOURCES[name]
    if model_type == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        }
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    common = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.3, "tie_word_embeddings": True, **special}
    config = AutoConfig.for_model(model_type, **(common | sizes | differences | changes))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or parameter.dim() == 1:
                parameter.normal_(0.5, 0.5)
    model.generation_config.pad_token_id = 0
    return model.eval()


def save_source(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """A folder with the model and a tokenizer that makes a token of every byte."""
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes; the last entry is the end of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate([*letters, "<end>"])}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))
