"""Loading what training saved, and what is said of folders that hold something else."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.conversion.checkpoints import save_source, tiny_source, token_ids
from transmamba.data import load_tokenizer
from transmamba.errors import CheckpointError
from transmamba.inference import load_checkpoint, load_language_model
from transmamba.models import TransMambaConfig, TransMambaForCausalLM


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with a model in it."""
    config = TransMambaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        trans_points=[0, 8],
        tie_word_embeddings=True,
    )
    TransMambaForCausalLM(config).save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("part", [".", "model"])
def test_a_model_comes_back_with_its_tokenizer(folder: Path, part: str) -> None:
    model, tokenizer = load_checkpoint(folder / part)
    assert not model.training
    assert model.config.trans_points == [0, 8]
    assert tokenizer.decode(tokenizer("Zürich").input_ids) == "Zürich"
    again = TransMambaForCausalLM.from_pretrained(folder / "model")
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_the_dtype_can_be_chosen(folder: Path) -> None:
    model, _ = load_checkpoint(folder, dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_sharded_weights_are_read(folder: Path) -> None:
    model, tokenizer = load_checkpoint(folder)
    model.save_pretrained(folder / "sharded", max_shard_size="10KB")
    tokenizer.save_pretrained(folder / "sharded")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    again, _ = load_checkpoint(folder / "sharded")
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
    shard = sorted((folder / "sharded").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names {shard.name}, which is missing"):
        load_checkpoint(folder / "sharded")


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def rename_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def change_config(**values: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        os.truncate(model / name, 40)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model\.safetensors is truncated or damaged .*copy it anew"),
        (rename_weights, r"no model\.safetensors; pytorch_model\.bin may be a pickle, which is never read"),
        (cut("config.json"), r"config\.json is truncated or not JSON"),
        (cut("tokenizer.json"), r"tokenizer\.json is truncated or not JSON"),
        (lambda model: (model / "tokenizer.json").unlink(), r"has no tokenizer\.json; save the tokenizer"),
        (lambda model: LlamaConfig().save_pretrained(model), """a model of type 'llama', not "transmamba" """[:-1]),
        (
            change_config(hidden_size=32, head_dim=16),
            r"embed_tokens\.weight has shape \(257, 16\) and should have \(257, 32\)",
        ),
        (change_config(num_hidden_layers=3, trans_points=[0, 8, None]), r"tensors are missing, model\.layers\.2"),
        (change_config(num_hidden_layers=1, trans_points=[0]), r"model\.layers\.1\S+ is unknown"),
        (change_config(trans_points=[0, 8, 9]), r"config\.json does not describe a model"),
        (change_config(vocab_size=100), r"embed_tokens\.weight has shape"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder / "model")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_paths_that_are_no_models_are_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no .*absent.*Give a folder that transmamba wrote"):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        load_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a run that has not come to its end"):
        load_checkpoint(tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_source(tiny_source("Llama"), tmp_path / "llama")


@pytest.mark.parametrize(("name", "kind"), [("Llama 3.1", LlamaForCausalLM), ("GPT-2", GPT2LMHeadModel)])
def test_other_models_come_with_their_tokenizer_too(tmp_path: Path, name: str, kind: type[PreTrainedModel]) -> None:
    save_source(tiny_source(name), tmp_path, max_shard_size="20KB")
    model, tokenizer = load_language_model(str(tmp_path), dtype=torch.float64)
    assert isinstance(model, kind)
    assert not model.training
    assert model.dtype == torch.float64
    assert tokenizer.decode(tokenizer("Zürich").input_ids) == "Zürich"
    exact = tiny_source(name).double()
    assert torch.equal(model(token_ids(1, 9)).logits, exact(token_ids(1, 9)).logits)


def test_a_run_may_hold_another_model(tmp_path: Path) -> None:
    save_source(tiny_source("Llama"), tmp_path / "model")
    assert isinstance(load_language_model(tmp_path)[0], LlamaForCausalLM)


@pytest.mark.parametrize("part", [".", "model"])
def test_our_own_models_are_loaded_by_the_same_function(folder: Path, part: str) -> None:
    model, _ = load_language_model(folder / part)
    assert isinstance(model, TransMambaForCausalLM)
    truncate(folder / "model")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load_language_model(folder / part)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model\.safetensors is truncated or damaged"),
        (rename_weights, "may be a pickle, which is never read"),
        (cut("config.json"), r"config\.json is truncated or not JSON"),
        (cut("tokenizer.json"), r"tokenizer\.json is truncated or not JSON"),
        (lambda model: (model / "tokenizer.json").unlink(), "cannot be loaded, or there is none"),
        (change_config(hidden_size=64), r"embed_tokens\.weight has shape \(257, 32\) and should have \(257, 64\)"),
        (change_config(num_hidden_layers=4), r"9 tensors are missing, model\.layers\.3\S+ first"),
        (change_config(num_hidden_layers=2), r"model\.layers\.2\S+ is unknown"),
        (change_config(vocab_size=200), "the tokenizer has 257 entries and the model 200"),
        (change_config(model_type="vit"), "a model of type 'vit', which is no causal language model"),
        (change_config(model_type="unheard"), "does not describe a model that transformers knows: .*unheard"),
        (change_config(hidden_size="wide"), "does not describe a model that transformers knows: .*hidden_size"),
        (change_config(hidden_act="unheard"), "cannot be loaded: KeyError 'unheard'"),
        (change_config(rope_parameters={"rope_type": "spiral"}), "a rotary embedding of type 'spiral'"),
        (change_config(max_position_embeddings=0), "has max_position_embeddings=0"),
    ],
)
def test_what_is_wrong_with_another_models_folder_is_said_and_nothing_else(
    llama: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    capfd.readouterr()
    damage(llama)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_language_model(llama)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_names_that_lead_nowhere_are_said_to(tmp_path: Path) -> None:
    for name in ("./absent", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"There is no .*absent; give the folder of a checkpoint"):
            load_language_model(name)
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        load_language_model(tmp_path)
