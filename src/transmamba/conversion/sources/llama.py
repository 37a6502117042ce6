"""Llama and what is built like it: Mistral, Qwen2, Qwen3, SmolLM2 (a Llama), SmolLM3."""

from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from transmamba.conversion.plan import Move
from transmamba.errors import CheckpointError, InputError

IGNORED_OF_LLAMA = ((r"rotary_emb\.inv_freq", "a table that the config gives"),)


def llama_choices(config: PreTrainedConfig, seq_len: int | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields of TransMambaConfig, and notes. seq_len: the length the student is meant for; None = the source's."""
    assert isinstance(config, LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config | SmolLM3Config)
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"its config.json has num_key_value_heads={config.num_key_value_heads}, which must divide "
            f"num_attention_heads={config.num_attention_heads}."
        )
    max_length, notes = _length(config, seq_len)
    choices = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": _head_dim(config),
        "hidden_act": config.hidden_act,
        "max_position_embeddings": max_length,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters or {}),
    }
    if isinstance(config, SmolLM3Config):
        choices |= {"rope_layers": [bool(entry) for entry in config.no_rope_layers[: config.num_hidden_layers]]}
    return choices | _parameters(config), notes


def llama_moves(config: PreTrainedConfig) -> list[Move]:
    """The table; names without the prefix of the backbone, but for the head."""
    assert isinstance(config, LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config | SmolLM3Config)
    choices = _parameters(config)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    biased = projections if choices.get("attention_bias") else []
    biased = biased[:3] if choices.get("attention_output_bias") is False else biased
    names = ["embed_tokens.weight", "norm.weight"]
    for layer in range(config.num_hidden_layers):
        at = f"layers.{layer}."
        names += [f"{at}input_layernorm.weight", f"{at}post_attention_layernorm.weight"]
        names += [f"{at}self_attn.{name}.weight" for name in projections]
        names += [f"{at}self_attn.{name}.bias" for name in biased]
        names += [f"{at}self_attn.{name}.weight" for name in ("q_norm", "k_norm") if choices.get("qk_norm")]
        endings = ("weight", "bias") if choices.get("mlp_bias") else ("weight",)
        names += [f"{at}mlp.{name}.{end}" for name in ("gate_proj", "up_proj", "down_proj") for end in endings]
    return [Move(source=name, target=name.replace(".self_attn.", ".mixer.")) for name in names]


def _parameters(config: PreTrainedConfig) -> dict[str, bool]:
    """The choices that decide which parameters there are."""
    choices: dict[str, bool] = {}
    if isinstance(config, Qwen2Config):
        choices |= {"attention_bias": True, "attention_output_bias": False}
    elif isinstance(config, LlamaConfig | Qwen3Config | SmolLM3Config):
        choices |= {"attention_bias": config.attention_bias}
    if isinstance(config, LlamaConfig | SmolLM3Config):
        choices |= {"mlp_bias": config.mlp_bias}
    if isinstance(config, Qwen3Config):
        choices |= {"qk_norm": True}
    return choices


def _head_dim(config: LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config | SmolLM3Config) -> int:
    explicit = None if isinstance(config, Qwen2Config | SmolLM3Config) else config.head_dim
    return explicit or config.hidden_size // config.num_attention_heads


def _window(config: PreTrainedConfig) -> int | None:
    """The sliding window, if some layer has one."""
    if isinstance(config, MistralConfig):
        return config.sliding_window
    if isinstance(config, Qwen2Config | Qwen3Config | SmolLM3Config):
        return config.sliding_window if "sliding_attention" in config.layer_types else None
    return None


def _length(config: PreTrainedConfig, seq_len: int | None) -> tuple[int, tuple[str, ...]]:
    """The student's max_position_embeddings: the source's, or no more than its sliding window, which is left out."""
    longest, window = config.max_position_embeddings, _window(config)
    if seq_len is not None and seq_len > longest:
        raise InputError(f"seq_len={seq_len} is longer than the source's {longest} positions; give at most {longest}.")
    if window is None or window >= longest:
        return longest, () if window is None else (f"the sliding window of {window} never binds within {longest}",)
    if (seq_len or longest) > window:
        raise CheckpointError(
            f"this model attends to the last {window} tokens only, and the student to all, so they would differ beyond "
            f"{window}; with a seq_len (--seq-len) of at most {window} the window never binds."
        )
    note = f"the sliding window of {window} is left out: it never binds within {window} tokens, the student's new limit"
    return window, (note,)
