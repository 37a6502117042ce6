"""An adaptation that takes a second: handwritten digits of 8 x 8 pixels, two layers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import DeiTConfig, DeiTForImageClassification

from transmamba.data import Augmentation, ImageSource
from transmamba.recipes import AdaptationRun, find_adaptation

SMALL: dict[str, Any] = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def write_teacher(folder: Path, **changes: Any) -> Path:
    """A DeiT of ten classes with random weights."""
    path = folder / "teacher"
    config = DeiTConfig(**(SMALL | {"intermediate_size": 48, "num_labels": 10} | changes))
    DeiTForImageClassification(config).save_pretrained(path)
    return path


def toy_adaptation(folder: Path, recipe: str = "adapt", **changes: Any) -> AdaptationRun:
    """A run of 4 steps in folder/run."""
    run = replace(
        find_adaptation(recipe)(),
        teacher=str(folder / "teacher"),
        student="vim_tiny",
        hidden_size=12,
        num_hidden_layers=2,
        images=ImageSource(image_size=8, train_share=0.05),
        augmentation=Augmentation(crop_padding=1, mixup=0.8, label_smoothing=0.1),
        batch_size=32,
        epochs=2,
        learning_rate=2e-3,
        cka_images=16,
        log_every=1,
        output=str(folder / "run"),
    )
    return replace(run, **changes)
