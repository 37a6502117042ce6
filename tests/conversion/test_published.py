"""Published checkpoints become our models with the logits of the published code, on weights made from names."""

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden.weights import filled, filled_weights, uniform
from tests.helpers import ROOT
from transmamba.conversion import load_published
from transmamba.conversion.published import PUBLISHED_FAMILIES
from transmamba.errors import CheckpointError

GOLDEN = {
    family: json.loads((ROOT / "tests" / "golden" / f"{family}.json").read_text()) for family in PUBLISHED_FAMILIES
}
CASES = [(family, case) for family, golden in GOLDEN.items() for case in golden["cases"]]
NEEDS_A_NAME = {("video_mamba", "image")}  # its tensors are named as ViM's


def save(folder: Path, weights: dict[str, Any]) -> Path:
    path = folder / "checkpoint.pth"
    torch.save(weights, path)
    return path


def fields_of(family: str, case: str) -> dict[str, Any]:
    fields = GOLDEN[family]["cases"][case].get("fields", {})
    return fields | ({"family": family} if (family, case) in NEEDS_A_NAME else {})


def weights_of(family: str, case: str) -> dict[str, Tensor]:
    return filled_weights(GOLDEN[family]["cases"][case]["parameters"])


def logits_of(model: torch.nn.Module, golden: dict[str, Any]) -> Tensor:
    x = filled("pixel_values", golden["pixel_values"])
    with torch.no_grad():
        return model(x).logits


def difference(found: Tensor, golden: dict[str, Any]) -> float:
    return (found - torch.tensor(golden["logits"])).abs().max().item()


@pytest.mark.parametrize(("family", "case"), CASES)
def test_logits_are_those_of_the_published_code(tmp_path: Path, family: str, case: str) -> None:
    golden = GOLDEN[family]["cases"][case]
    model = load_published(save(tmp_path, weights_of(family, case)), **fields_of(family, case))
    assert not model.training
    assert model.config.model_type == family
    found = logits_of(model, golden)
    assert difference(found, golden) < 1e-4
    assert found.std() > 0.1  # logits that hardly differ would agree with anything


@pytest.mark.parametrize("family", GOLDEN)
def test_another_weight_would_show(tmp_path: Path, family: str) -> None:
    case = next(iter(GOLDEN[family]["cases"]))
    weights = weights_of(family, case)
    name = next(name for name in weights if name.endswith(("A_log", "A_logs")))
    weights[name] = weights[name] + 0.1
    model = load_published(save(tmp_path, weights), **fields_of(family, case))
    assert difference(logits_of(model, GOLDEN[family]["cases"][case]), GOLDEN[family]["cases"][case]) > 1e-3


@pytest.mark.parametrize("family", GOLDEN)
def test_provenance_is_recorded(family: str) -> None:
    provenance = GOLDEN[family]["provenance"]
    assert {"repository", "commit", "files", "date", "python", "torch", "note"} <= set(provenance)


def test_weights_from_names_are_the_same_everywhere() -> None:
    assert uniform("a", 3).tolist() == pytest.approx(GOLDEN_UNIFORM, abs=1e-12)
    assert abs(float(uniform("b", 10_000).mean())) < 0.03


GOLDEN_UNIFORM = [-0.1458972590473775, 0.7218045452026962, 0.1686567018218026]


def vim_weights() -> dict[str, Tensor]:
    return weights_of("vim", "square")


def vim_logits(model: torch.nn.Module) -> float:
    return difference(logits_of(model, GOLDEN["vim"]["cases"]["square"]), GOLDEN["vim"]["cases"]["square"])


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_usual_wrappings_are_taken_off(tmp_path: Path, key: str) -> None:
    parallel = {f"module.{name}": tensor for name, tensor in vim_weights().items()}
    content = {key: parallel, "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}
    assert vim_logits(load_published(save(tmp_path, content))) < 1e-4


def test_plain_data_of_training_scripts_is_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CfgNode(dict):  # as yacs has it
        pass

    module = ModuleType("yacs.config")
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode  # type: ignore[attr-defined]
    node = CfgNode(MODEL=CfgNode(TYPE="vssm"))
    node.__dict__["__immutable__"] = True
    content = {"model": vim_weights(), "config": node, "max_accuracy": np.float64(0.5), "best": np.float32(0.25)}
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patched.setitem(sys.modules, "yacs.config", module)
        path = save(tmp_path, content)
    assert vim_logits(load_published(path)) < 1e-4


def test_a_model_of_images_becomes_one_of_videos(tmp_path: Path) -> None:
    golden = GOLDEN["video_mamba"]["cases"]["image"]
    path = save(tmp_path, weights_of("video_mamba", "image"))
    still = filled("pixel_values", golden["pixel_values"])
    one = load_published(path, family="video_mamba", num_frames=1)
    with torch.no_grad():
        assert difference(one(still[:, None]).logits, golden) < 1e-4  # an image is a video of one frame
        film = load_published(path, family="video_mamba", num_frames=6, tubelet_size=3)
        middle = torch.zeros(2, 3, 3, 32, 32)
        middle[:, 1] = still
        assert difference(film(middle).logits, golden) < 1e-4  # the middle frame of a tubelet is read
        assert film(middle.repeat(1, 2, 1, 1, 1)).last_hidden_state.shape == (2, 33, 24)


def test_averaged_weights_are_taken_when_asked_for(tmp_path: Path) -> None:
    content = {"model": {name: tensor * 0 for name, tensor in vim_weights().items()}, "model_ema": vim_weights()}
    assert vim_logits(load_published(save(tmp_path, content), key="model_ema")) < 1e-4
    with pytest.raises(CheckpointError, match="no entry 'ema' with weights; its dictionaries are model, model_ema"):
        load_published(save(tmp_path, content), key="ema")


def test_safetensors_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(vim_weights(), path)
    assert vim_logits(load_published(path)) < 1e-4


def test_a_loaded_model_can_be_saved_and_loaded(tmp_path: Path) -> None:
    model = load_published(save(tmp_path, vim_weights()))
    model.save_pretrained(tmp_path / "ours")
    assert vim_logits(type(model).from_pretrained(tmp_path / "ours").eval()) < 1e-4


class Code:
    """What unpickling must not build."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.mixer.D_b"), r"lacks layers\.1\.mixer\.D_b"),
        (lambda w: w.update({"layers.0.mixer.gamma": torch.ones(3)}), r"has layers\.0\.mixer\.gamma, which has no"),
        (lambda w: w.update({"norm_f.weight": torch.ones(3)}), r"norm_f\.weight has shape \(3,\).* ask for \(24,\)"),
        (lambda w: w.update({"pos_embed": torch.ones(1, 16, 24)}), r"positions for 15 patches, which are no square"),
        (lambda w: [w.pop(name) for name in list(w) if "mixer" in name], "of no known family"),
        (lambda w: w.clear(), "holds no tensors"),
        (lambda w: w.update({"extra": Code()}), "beside its weights"),
    ],
    ids=["lacking", "unknown", "shape", "no square", "no family", "empty", "code"],  # workers must agree on them
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    weights: dict[str, Any] = vim_weights()
    change(weights)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_published(save(tmp_path, weights))
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        load_published(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"text\.pth"):
        load_published(tmp_path / "text.pth")
    path = save(tmp_path, vim_weights())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="copy it anew"):
        load_published(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_published(path)
    with pytest.raises(CheckpointError, match="no published family 'swin'; choose one of plain_mamba"):
        load_published(save(tmp_path, vim_weights()), family="swin")
