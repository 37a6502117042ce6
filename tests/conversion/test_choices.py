"""What converted models need of TransMambaConfig: choices that are checked, saved, and off by default."""

from pathlib import Path

import pytest
import torch
from torch import nn

from transmamba import TransMambaConfig, TransMambaForCausalLM
from transmamba.errors import InputError

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "trans_points": [0, 5],
}
CHOICES = {
    "norm_type": "layer",
    "qk_norm": True,
    "attention_bias": True,
    "attention_output_bias": False,
    "gate_bias": True,
    "mlp_gated": False,
    "rope_layers": [True, False],
}


def test_choices_are_off_by_default() -> None:
    config = TransMambaConfig(**SIZES)
    assert (config.norm_type, config.position_embedding, config.mlp_gated) == ("rms", "rotary", True)
    assert not config.qk_norm
    assert not config.gate_bias
    names = {name.rpartition("layers.0.")[2] for name, _ in TransMambaForCausalLM(config).named_parameters()}
    assert not names & {"mixer.q_norm.weight", "mixer.z_proj.bias", "embed_positions.weight", "input_layernorm.bias"}


def test_choices_survive_saving_and_are_drawn(tmp_path: Path) -> None:
    model = TransMambaForCausalLM(TransMambaConfig(**SIZES, **CHOICES))
    model.save_pretrained(tmp_path)
    again = TransMambaForCausalLM.from_pretrained(tmp_path)
    for name, value in CHOICES.items():
        assert getattr(again.config, name) == value
    layer = again.model.layers[1]
    assert isinstance(again.model.norm, nn.LayerNorm)
    assert (layer.mixer.q_proj.bias is None, layer.mixer.o_proj.bias is None) == (False, True)
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    parameters = dict(model.named_parameters())
    assert (parameters["model.norm.bias"] == 0).all()
    assert (parameters["model.layers.0.mixer.z_proj.bias"] == 0).all()
    assert (parameters["model.layers.0.mixer.q_norm.weight"] == 1).all()


def test_learned_positions_are_drawn_and_leave_no_rotary_embedding() -> None:
    model = TransMambaForCausalLM(TransMambaConfig(**SIZES, position_embedding="learned"))
    positions = model.model.embed_positions.weight
    assert positions.shape == (32, 24)
    assert abs(positions.std() / model.config.initializer_range - 1) < 0.1
    assert model.model.rotary_emb is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "batch"}, "norm_type='batch' is unknown; choose 'rms' or 'layer'"),
        ({"position_embedding": "alibi"}, "position_embedding='alibi' is unknown; choose 'rotary' or 'learned'"),
        ({"position_embedding": "learned", "ssm_rope": True}, "leaves no rotary embedding; drop ssm_rope"),
        ({"position_embedding": "learned", "rope_layers": [True, True]}, "leaves no rotary embedding"),
        ({"rope_layers": [True]}, "rope_layers has 1 entries and the model 2 layers"),
        ({"rope_layers": [1, 0]}, "rope_layers: layer 0 has 1; give true or false"),
    ],
)
def test_choices_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TransMambaConfig(**SIZES, **changes)
