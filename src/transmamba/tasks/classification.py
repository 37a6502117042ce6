"""Image classification: how often the right class is the first guess, or among five, and what is taken for what."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from transmamba.errors import InputError

__all__ = ["ClassificationScore", "ImageBatch", "evaluate_classifier", "linear_cka"]

GUESSES = 5


class ImageBatch(TypedDict):
    """pixel_values (batch, channels, height, width), normalised; labels (batch,)."""

    pixel_values: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationScore:
    """Shares of images between 0 and 1. loss: nats an image.

    confusion: a row for each true class, of how many of its images were taken for each class. Of equal logits the lower
    class goes first.
    """

    num_images: int
    top_1: float
    top_5: float
    loss: float
    confusion: tuple[tuple[int, ...], ...]


@torch.no_grad()
def evaluate_classifier(model: Any, batches: Iterable[ImageBatch]) -> ClassificationScore:
    """Score a model whose output has logits (batch, classes); it is in evaluation mode meanwhile.

    Raises:
        InputError: there is no image.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    confusion: Tensor | None = None
    right_5, loss, count = 0, 0.0, 0
    try:
        for batch in batches:
            labels = batch["labels"].to(device)
            logits = model(batch["pixel_values"].to(device)).logits.float()
            classes = logits.shape[1]
            order = torch.argsort(logits, dim=1, descending=True, stable=True)[:, :GUESSES]
            right_5 += int((order == labels[:, None]).any(1).sum())
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
            pairs = torch.bincount(labels * classes + order[:, 0], minlength=classes**2).view(classes, classes).cpu()
            confusion = pairs if confusion is None else confusion + pairs
    finally:
        model.train(was_training)
    if confusion is None or not count:
        raise InputError("there is no image to score; give at least one.")
    return ClassificationScore(
        num_images=count,
        top_1=int(confusion.diag().sum()) / count,
        top_5=right_5 / count,
        loss=loss / count,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Centred kernel alignment of two sets of features of the same images, (images, width) each: 0 to 1.

    1 where one is the other turned, scaled and shifted. Source: Kornblith et al. 2019 (arXiv 1905.00414), section 3.
    """
    if len(first) != len(second) or len(first) < 2:
        raise InputError(f"the features are of {len(first)} and {len(second)} images; give the same, at least two.")
    x, y = (features.double() - features.double().mean(0) for features in (first, second))
    # Through the images' Gram matrices, which are small where features are wide.
    a, b = x @ x.T, y @ y.T
    return float(torch.sum(a * b) / (a.norm() * b.norm()).clamp(min=torch.finfo(torch.float64).tiny))
