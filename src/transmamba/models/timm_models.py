"""The vision backbones as timm's models: create_model("vim_tiny", num_classes=10) after one call here."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transmamba.errors import InputError

from .presets import VISION_PRESETS, vision_model

# timm's words for ours.
FIELDS = {"num_classes": "num_labels", "img_size": "image_size", "in_chans": "num_channels"}
TIMMS_OWN = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "global_pool", "scriptable", "exportable")
NO_WEIGHT_DECAY = ("pos_embed", "cls_token", "temporal_pos_embedding", "A_log", "A_b_log", "A_logs", "D", "D_b", "Ds")

_registered: list[str] = []


def register_with_timm() -> list[str]:
    """Make timm know every name of VISION_PRESETS; return the names. A second call does nothing.

    Raises:
        InputError: timm is not installed.
    """
    try:
        from timm.models import register_model
    except ImportError as error:
        raise InputError(
            "timm is not installed; pip install timm, or build the model with vision_model(name)."
        ) from error
    for name in VISION_PRESETS if not _registered else ():
        register_model(_entry_point(name))
        _registered.append(name)
    return list(_registered)


class TimmVisionMamba(nn.Module):
    """A vision backbone with its head under timm's method names; `model` is the classifier of ours inside."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__()
        fields = {FIELDS.get(key, key): value for key, value in kwargs.items() if key not in TIMMS_OWN}
        self.model = vision_model(name, **({"num_labels": 1000} | fields))
        self.num_classes = self.model.num_labels
        self.num_features = self.head_hidden_size = self.model.backbone.num_features
        height, width = self.model.config.image_size, self.model.config.image_size
        if not isinstance(height, int):
            height, width = height
        self.pretrained_cfg = self.default_cfg = {
            "architecture": name,
            "num_classes": self.num_classes,
            "input_size": (self.model.config.num_channels, height, width),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "classifier": "model.classifier",
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The sequence after the final norm."""
        return self.model.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what forward_features gives, or what the head reads."""
        x = self.model.backbone.pool(x)
        return x if pre_logits else self.model.classifier(x)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.model.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for so many classes; 0 = none."""
        self.num_classes = num_classes
        old = next(self.model.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.model.classifier = head.to(old.device, old.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute layers again in the backward pass instead of keeping what is inside them."""
        self.model._set_gradient_checkpointing(enable, partial(checkpoint, use_reentrant=False))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimisers must not decay; it leaves out vectors by itself."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in NO_WEIGHT_DECAY}


def _entry_point(name: str) -> Callable[..., TimmVisionMamba]:
    def create(pretrained: bool = False, **kwargs: Any) -> TimmVisionMamba:
        if pretrained:
            raise InputError(
                f"{name} has no weights to download; load a published file with transmamba.conversion.load_published."
            )
        return TimmVisionMamba(name, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    return create
