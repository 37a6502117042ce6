"""Small Transformers of images with random weights; no parameter has a value that would not show."""

from typing import Any

import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

TEACHERS: dict[str, tuple[type, type]] = {
    "ViT": (ViTConfig, ViTForImageClassification),
    "DeiT": (DeiTConfig, DeiTForImageClassification),
    "DeiT with two heads": (DeiTConfig, DeiTForImageClassificationWithTeacher),
}
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}


def vision_teacher(name: str = "DeiT", **changes: Any) -> PreTrainedModel:
    """A seeded model in evaluation mode, fp32."""
    config, model = TEACHERS[name]
    made = model(config(**(SIZES | changes)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if parameter.dim() == 1:
                parameter.add_(0.5)
    return made.eval()
