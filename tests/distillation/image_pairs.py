"""A small Transformer of images, small students of every family, and batches for both."""

from typing import Any

import torch
from torch import Tensor

from tests.conversion.vision_teachers import vision_teacher
from tests.helpers import DEVICE
from tests.models.vision_models import tiny_vision_model
from transmamba.distillation import (
    AdaptionLoss,
    AdaptionObjective,
    LatentProjections,
    VisionTeacher,
    make_projections,
)
from transmamba.models import VisionMambaClassifier


def teacher_of_images(name: str = "DeiT", **changes: Any) -> VisionTeacher:
    """Three blocks, width 24, 4 x 4 patches."""
    return VisionTeacher(vision_teacher(name, **changes).to(DEVICE))


def image_batch(rows: int = 2, *, soft: bool = False) -> dict[str, Tensor]:
    """Random images of 32 x 32, with class numbers or probabilities."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(5, (rows,), generator=generator)
    if soft:
        labels = torch.rand(rows, 5, generator=generator).softmax(-1)
    images = torch.randn(rows, 3, 32, 32, generator=generator)
    return {"pixel_values": images.to(DEVICE), "labels": labels.to(DEVICE)}


def adaption(
    family: str = "vim", teacher: str = "DeiT", *, sharing: str = "direction", padding: bool = True, **settings: Any
) -> tuple[VisionMambaClassifier, AdaptionObjective, LatentProjections]:
    """A student, its objective and the projections between them."""
    student, one, loss = tiny_vision_model(family), teacher_of_images(teacher), AdaptionLoss(**settings)
    pixel_values = image_batch()["pixel_values"]
    projections = make_projections(student, one, pixel_values, loss, sharing=sharing, padding=padding)
    return student, AdaptionObjective(student, one, projections, loss), projections
