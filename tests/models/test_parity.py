"""The baselines against transformers' own models on copied weights: Mamba-2 in its torch path, and Llama."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from tests.helpers import DEVICE, relative_rms_error
from tests.models.language_models import VOCAB_SIZE, tiny_model, tokens
from transmamba import TransMambaForCausalLM
from transmamba.ops import ssd_scan

FP32 = 1e-5

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("seq_len", [1, 37, 150])
@pytest.mark.parametrize("with_state", [False, True])
def test_ssd_scan_agrees_with_the_chunked_scan_of_transformers(groups: int, seq_len: int, with_state: bool) -> None:
    heads, state_size, head_dim = 8, 16, 12
    k, q = (torch.randn(2, seq_len, groups, state_size) for _ in range(2))
    v, dt = torch.randn(2, seq_len, heads, head_dim), torch.rand(2, seq_len, heads)
    A, D = -torch.rand(heads) * 4 - 0.1, torch.randn(heads)
    state = torch.randn(2, heads, state_size, head_dim) if with_state else None
    y, final = ssd_scan(q, k, v, dt, A, D, initial_state=state, return_final_state=True)
    their_state = None if state is None else state.transpose(-1, -2)
    theirs, their_final = chunk_scan()(v, dt, A, k, q, 32, D=D, initial_states=their_state, return_final_states=True)
    assert relative_rms_error(y, theirs) < FP32
    assert relative_rms_error(final, their_final.transpose(-1, -2)) < FP32


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("seq_len", [3, 37, 150])
def test_mamba2_schedule_in_standard_form_agrees_with_transformers_mamba2(heads: int, seq_len: int) -> None:
    ours, theirs = mamba2_pair(heads)
    ids = tokens(2, seq_len)
    assert relative_rms_error(ours(ids).logits, theirs(ids, use_cache=False).logits) < FP32


def test_a_wrong_copy_into_mamba2_is_seen() -> None:
    ours, theirs = mamba2_pair(4)
    ids = tokens(2, 37)
    exact = theirs(ids, use_cache=False).logits
    mixer = ours.model.layers[1].mixer
    for parameter in (mixer.A_log, mixer.D, mixer.dt_bias, mixer.conv1d.bias, mixer.ssm_norm.weight):
        kept = parameter.clone()
        parameter.mul_(1.05)
        assert relative_rms_error(ours(ids).logits, exact) > 10 * FP32
        parameter.copy_(kept)
    assert relative_rms_error(ours(ids).logits, exact) < FP32


def test_mamba2_decoding_agrees_with_transformers_mamba2() -> None:
    ours, theirs = mamba2_pair(4)
    ids = tokens(2, 12)
    exact = theirs(ids, use_cache=False).logits
    first = ours(ids[:, :9])
    pieces = [first.logits]
    pieces += [ours(ids[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(9, 12)]
    assert relative_rms_error(torch.cat(pieces, dim=1), exact) < FP32


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"rope_parameters": LLAMA3_ROPE},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 16},
    ],
    ids=str,
)
def test_transformer_schedule_in_standard_form_agrees_with_transformers_llama(changes: dict[str, Any]) -> None:
    ours, theirs = llama_pair(**changes)
    ids = tokens(2, 150)
    assert relative_rms_error(ours(ids).logits, theirs(ids).logits) < FP32

    mask = torch.ones(2, 40, dtype=torch.int64, device=DEVICE)
    mask[1, :13] = 0
    found, exact = (model(ids[:, :40], attention_mask=mask).logits for model in (ours, theirs))
    assert relative_rms_error(found[0], exact[0]) < FP32
    assert relative_rms_error(found[1, 13:], exact[1, 13:]) < FP32


def test_transformer_schedule_generates_what_llama_generates() -> None:
    ours, theirs = llama_pair()
    ids = tokens(2, 9)
    outputs = [model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0) for model in (ours, theirs)]
    assert torch.equal(*outputs)


def test_rotation_of_another_base_is_seen() -> None:
    ours, theirs = llama_pair(rope_parameters={"rope_type": "default", "rope_theta": 9000.0})
    theirs.model.rotary_emb.inv_freq.copy_(llama_pair()[1].model.rotary_emb.inv_freq)
    ids = tokens(2, 150)
    assert relative_rms_error(ours(ids).logits, theirs(ids).logits) > 10 * FP32


def chunk_scan() -> Callable[..., Any]:
    """The chunked scan of transformers' torch path, beneath its dispatch to kernel packages."""
    scan = modeling_mamba2.mamba2_chunk_scan
    return getattr(scan, "__wrapped__", scan)


def mamba2_pair(heads: int) -> tuple[TransMambaForCausalLM, Mamba2ForCausalLM]:
    """The two models with the same weights: no MLP, one B and C per head, as many channels as the hidden size."""
    ours = tiny_model(
        mixer_form="standard",
        trans_points="mamba2",
        intermediate_size=0,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=1e-5,
    ).requires_grad_(False)
    width = ours.config.hidden_size
    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            num_hidden_layers=ours.config.num_hidden_layers,
            expand=1,
            num_heads=heads,
            head_dim=width // heads,
            state_size=width // heads,
            n_groups=heads,
            chunk_size=32,
        )
    )
    theirs = theirs.to(DEVICE).eval().requires_grad_(False)
    theirs.backbone.embeddings.weight.copy_(ours.model.embed_tokens.weight)
    theirs.backbone.norm_f.weight.copy_(ours.model.norm.weight)
    theirs.lm_head.weight.copy_(ours.lm_head.weight)
    for layer, block in zip(ours.model.layers, theirs.backbone.layers, strict=True):
        mine, their = layer.mixer, block.mixer
        block.norm.weight.copy_(layer.input_layernorm.weight)
        projections = (mine.z_proj, mine.v_proj, mine.k_proj, mine.q_proj, mine.dt_proj)
        their.in_proj.weight.copy_(torch.cat([projection.weight for projection in projections]))
        their.conv1d.weight.copy_(as_x_B_C(mine.conv1d.weight, width))
        their.conv1d.bias.copy_(as_x_B_C(mine.conv1d.bias, width))
        their.out_proj.weight.copy_(mine.o_proj.weight)
        their.norm.weight.copy_(mine.ssm_norm.weight)
        their.norm.group_size = width  # transformers normalises each group; ours the whole width, as one group does
        for name in ("A_log", "D", "dt_bias"):
            their.get_parameter(name).copy_(mine.get_parameter(name))
    return ours, theirs


def as_x_B_C(channels: Tensor, width: int) -> Tensor:
    """Channels in our order q, k, v to Mamba-2's x, B, C."""
    q, k, v = channels.split(width)
    return torch.cat([v, k, q])


def llama_pair(**changes: Any) -> tuple[TransMambaForCausalLM, LlamaForCausalLM]:
    """The two models with the same weights; the names are those of Llama but for the attention's."""
    ours = tiny_model(mixer_form="standard", trans_points="transformer", **changes).requires_grad_(False)
    shared = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings attention_bias mlp_bias"
    )
    theirs = LlamaForCausalLM(LlamaConfig(**{name: getattr(ours.config, name) for name in shared.split()}))
    renamed = {name.replace(".mixer.", ".self_attn."): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(renamed)
    return ours, theirs.to(DEVICE).eval().requires_grad_(False)
