"""GPT-2: LayerNorm, learned positions, a plain MLP, biases; weights are (inputs, outputs), with q, k and v in one."""

from typing import Any

from transformers import GPT2Config, PreTrainedConfig

from transmamba.conversion.plan import Move, Part
from transmamba.errors import CheckpointError, InputError

IGNORED_OF_GPT2 = ((r"attn\.(masked_)?bias", "a causal mask, which is no parameter"),)


def gpt2_choices(config: PreTrainedConfig, seq_len: int | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields of TransMambaConfig, and notes. seq_len: the length the student is meant for; None = the source's."""
    assert isinstance(config, GPT2Config)
    for name, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if getattr(config, name) != usual:
            raise CheckpointError(f"{name}={not usual} has no counterpart here; only {name}={usual} can be converted.")
    longest = config.n_positions
    if seq_len is not None and seq_len > longest:
        raise InputError(f"seq_len={seq_len} is longer than the source's {longest} positions; give at most {longest}.")
    choices = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_act": config.activation_function,
        "max_position_embeddings": config.n_positions,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.layer_norm_epsilon,
        "norm_type": "layer",
        "position_embedding": "learned",
        "mlp_gated": False,
        "attention_bias": True,
        "mlp_bias": True,
    }
    return choices, ()


def gpt2_moves(config: PreTrainedConfig) -> list[Move]:
    """The table; names without the prefix of the backbone, but for the head."""
    assert isinstance(config, GPT2Config)
    width = config.n_embd
    moves = [
        Move(source="wte.weight", target="embed_tokens.weight"),
        Move(source="wpe.weight", target="embed_positions.weight"),
        *_both("ln_f", "norm"),
    ]
    for layer in range(config.n_layer):
        source, target = f"h.{layer}.", f"layers.{layer}."
        moves += _both(f"{source}ln_1", f"{target}input_layernorm")
        moves += _both(f"{source}ln_2", f"{target}post_attention_layernorm")
        for place, name in enumerate(("q_proj", "k_proj", "v_proj")):
            moves += _linear(f"{source}attn.c_attn", f"{target}mixer.{name}", place * width, (place + 1) * width)
        moves += _linear(f"{source}attn.c_proj", f"{target}mixer.o_proj")
        moves += _linear(f"{source}mlp.c_fc", f"{target}mlp.up_proj")
        moves += _linear(f"{source}mlp.c_proj", f"{target}mlp.down_proj")
    return moves


def _both(source: str, target: str) -> list[Move]:
    return [Move(source=f"{source}.{end}", target=f"{target}.{end}") for end in ("weight", "bias")]


def _linear(source: str, target: str, start: int | None = None, stop: int = 0) -> list[Move]:
    """weight (inputs, outputs) and bias (outputs,); only outputs from start to stop, where start is given."""
    weight, bias = (None if start is None else Part(dim=dim, start=start, stop=stop) for dim in (1, 0))
    return [
        Move(source=f"{source}.weight", target=f"{target}.weight", transform="transpose", part=weight),
        Move(source=f"{source}.bias", target=f"{target}.bias", part=bias),
    ]
