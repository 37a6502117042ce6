"""What is said of folders and names that hold no checkpoint that can be converted."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.checkpoints import tiny_source
from transmamba.conversion import plan_conversion
from transmamba.errors import CheckpointError

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_source("Llama").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    tiny_source("Llama").save_pretrained(tmp_path)
    return tmp_path


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def change_config(**values: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_weights(lambda w: w.pop(NORM)), f"lacks {NORM}, which its config.json asks for"),
        (change_weights(lambda w: w.update(extra=torch.ones(2))), "has extra, which has no place in the student"),
        (change_weights(lambda w: w.update({NORM: torch.ones(31)})), rf"{NORM} has shape \(31,\)"),
        (
            change_weights(lambda w: [w.update({k: x.to(torch.int8)}) for k, x in w.items()]),
            "holds I8, not floating point weights",
        ),
        (change_config(num_hidden_layers=4), r"lacks model\.layers\.3\S+ and 8 more"),
        (change_config(num_hidden_layers=2), r"has model\.layers\.2\S+ and 8 more, which has no place"),
        (change_config(vocab_size=300), r"embed_tokens\.weight has shape \(257, 32\)"),
        (change_config(model_type="deepseek_v3"), "type 'deepseek_v3', which cannot be converted; known are gpt2"),
        (change_config(model_type=None, auto_map={"AutoConfig": "evil.Config"}), "of type None"),
        (change_config(quantization_config={"quant_method": "gptq"}), "is quantized; convert the checkpoint"),
        (change_config(hidden_size="wide"), "does not describe a llama"),
        (change_config(model_type="transmamba"), "is a TransMamba already; set_trans_points changes its schedule"),
        (
            change_config(rope_parameters={"rope_type": "spiral"}),
            "a rotary embedding of type 'spiral', which is not known",
        ),
        (change_config(rope_parameters={"rope_type": "yarn"}), "does not describe a llama: .*factor"),
        (change_config(max_position_embeddings=0), "has max_position_embeddings=0; it must be at least 1"),
        (change_config(num_key_value_heads=3), "num_key_value_heads=3, which must divide num_attention_heads=4"),
        (lambda f: os.truncate(f / "config.json", 20), r"config\.json is truncated or not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a list and not an object"),
        (lambda f: (f / "config.json").unlink(), r"holds no model: there is no config\.json"),
        (lambda f: os.truncate(f / "model.safetensors", 3000), r"model\.safetensors is truncated or damaged"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"pytorch_model\.bin may be a pickle, which is never read\. Save the model as safetensors",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(whole: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(whole)
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(whole)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names {shard.name}, which is missing"):
        plan_conversion(folder)


def test_tables_that_old_checkpoints_carry_are_ignored_with_the_reason(whole: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(lambda w: w.update({name: torch.ones(4)}))(whole)
    (tensor,) = plan_conversion(whole).ignored
    assert (tensor.source, tensor.reason) == (name, "a table that the config gives")


def test_a_head_that_is_stored_but_tied_is_ignored_and_another_one_is_used(whole: Path) -> None:
    change_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))(whole)
    assert [tensor.source for tensor in plan_conversion(whole).ignored] == ["lm_head.weight"]
    change_weights(lambda w: w["lm_head.weight"].add_(1))(whole)
    plan = plan_conversion(whole)
    assert plan.ignored == ()
    assert plan.copied[-1].target == "lm_head.weight"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent", "There is no ./absent; give the folder of a checkpoint, or a Hugging Face id"),
        ("a/b/c", "There is no a/b/c"),
        (Path("absent"), "There is no absent; give the folder"),
        ("nobody/nothing", "There is no folder nobody/nothing, and it could not be had as a Hugging Face id"),
    ],
)
def test_names_that_lead_nowhere_are_said_to(name: str | Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(name)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        plan_conversion(tmp_path / "model.safetensors")
