"""Saving and loading: safetensors only, whole or sharded, tied or not, in any dtype, by name or by the Auto classes."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.helpers import DEVICE, relative_rms_error
from tests.models.language_models import VARIANTS, tiny_model, tokens
from transmamba import TransMambaForCausalLM, TransMambaModel
from transmamba.models.transmamba import initial_values
from transmamba.models.transmamba.initial_values import find_initial_value


def load(folder: Path, **given: object) -> TransMambaForCausalLM:
    return TransMambaForCausalLM.from_pretrained(folder, **given).to(DEVICE).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_model_is_the_saved_one(tmp_path: Path, variant: str) -> None:
    model, ids = tiny_model(**VARIANTS[variant]), tokens(2, 12)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.trans_points == model.config.trans_points
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("tied", [False, True])
def test_shards_make_the_same_model(tmp_path: Path, tied: bool) -> None:
    model, ids = tiny_model(tie_word_embeddings=tied), tokens(1, 12)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_saved_once_and_stays_tied(tmp_path: Path, tied: bool) -> None:
    tiny_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    loaded = load(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_loads_in_any_dtype_and_equals_the_cast_one(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded, cast, ids = load(tmp_path, dtype=dtype), copy.deepcopy(model).to(dtype), tokens(2, 12)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded(ids).logits.dtype == dtype
    assert torch.equal(loaded(ids).logits, cast(ids).logits)
    assert relative_rms_error(loaded(ids).logits, model(ids).logits) < 2**-4


def test_frequencies_stay_fp32_when_the_model_is_cast() -> None:
    model = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    exact = model.model.rotary_emb.inv_freq.clone()
    for cast in (model.to(torch.bfloat16), model.half(), model.double(), model.float()):
        assert cast.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(cast.model.rotary_emb.inv_freq, exact)


def test_a_saved_dtype_comes_back(tmp_path: Path) -> None:
    tiny_model(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_auto_classes_know_the_model(tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens(1, 9)
    model.save_pretrained(tmp_path)
    whole, backbone = AutoModelForCausalLM.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    assert type(whole) is TransMambaForCausalLM
    assert type(backbone) is TransMambaModel
    assert torch.equal(whole.to(DEVICE)(ids).logits, model(ids).logits)
    assert torch.equal(backbone.to(DEVICE)(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert type(AutoModelForCausalLM.from_config(model.config)) is TransMambaForCausalLM


def test_a_backbone_loads_into_a_language_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_model(tie_word_embeddings=True), tokens(1, 9)
    model.model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


def test_a_schedule_set_at_inference_is_saved(tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens(1, 12)
    model.set_trans_points([None, 3, 0])
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.trans_points == [None, 3, 0]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_missing_parameters_get_their_initial_values_and_the_others_stay(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    missing = [
        f"model.layers.1.mixer.{name}"
        for name in ("A_log", "dt_bias", "D", "conv1d.weight", "conv1d.bias", "q_proj.weight", "z_proj.weight")
    ] + ["model.layers.2.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"]
    save_file(
        {name: value for name, value in saved.items() if name not in missing},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    loaded, report = TransMambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(missing)
    table = initial_values(model.config)
    for name, parameter in loaded.named_parameters():
        if name not in missing:
            assert torch.equal(parameter, saved[name].to(parameter.device)), name
            continue
        row = find_initial_value(table, name)
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, saved[name]), name
        if row.distribution == "constant":
            assert (parameter == row.a).all(), name
        elif row.distribution == "normal":
            assert 0.8 * row.a < parameter.std() < 1.2 * row.a, name
        elif row.distribution == "uniform":
            assert row.a <= parameter.min() < 0 < parameter.max() <= row.b, name


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|invalid"):
        load(tmp_path)


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model, ids = tiny_model(), tokens(1, 12)
    twin = copy.deepcopy(model)
    before = model(ids).logits
    assert torch.equal(twin(ids).logits, before)
    with torch.no_grad():
        twin.model.layers[1].mixer.q_proj.weight.add_(1.0)
    twin.set_trans_points("mamba2")
    assert torch.equal(model(ids).logits, before)
    assert model.config.trans_points == [0, 7, None]
