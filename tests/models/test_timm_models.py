"""timm's registry gets the vision backbones, under its own words; a stand-in for timm, which the tests do not need."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from tests.models.vision_models import COMMON, PLAIN, images
from transmamba.errors import InputError
from transmamba.models import VISION_PRESETS, register_with_timm, timm_models


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., timm_models.TimmVisionMamba]]:
    found: dict[str, Callable[..., timm_models.TimmVisionMamba]] = {}

    def register_model(create: Callable[..., timm_models.TimmVisionMamba]) -> Callable[..., object]:
        assert create.__module__ in sys.modules
        found[create.__name__] = create
        return create

    timm, models = ModuleType("timm"), ModuleType("timm.models")
    models.register_model = register_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    monkeypatch.setattr(timm_models, "_registered", [])
    return found


def test_every_preset_is_registered_once(registry: dict) -> None:
    assert register_with_timm() == list(VISION_PRESETS) == list(registry)
    registry.clear()
    assert register_with_timm() == list(VISION_PRESETS)
    assert not registry


def test_a_registered_model_speaks_timm(registry: dict) -> None:
    register_with_timm()
    fields = {name: value for name, value in (COMMON | PLAIN).items() if name not in ("image_size", "num_labels")}
    model = registry["vim_tiny"](num_classes=7, img_size=32, in_chans=3, pretrained_cfg=None, **fields).eval()
    x = images("vim").cpu()
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (2, 7)
        assert torch.equal(logits, model.model(x).logits)
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 16)
        model.reset_classifier(0)
        assert model(x).shape == (2, 16)
        model.reset_classifier(4)
        assert model(x).shape == (2, 4)
    assert model.get_classifier().out_features == model.num_classes == 4
    assert "model.backbone.layers.0.mixer.A_b_log" in model.no_weight_decay()
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    model.set_grad_checkpointing()
    assert all(layer.gradient_checkpointing for layer in model.model.backbone.layers)
    with pytest.raises(InputError, match="vim_tiny has no weights to download"):
        registry["vim_tiny"](pretrained=True)


def test_without_timm_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(
        InputError, match="timm is not installed; pip install timm, or build the model with vision_model"
    ):
        register_with_timm()
