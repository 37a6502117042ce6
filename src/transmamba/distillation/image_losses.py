"""The terms that every objective of images is made of."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from transmamba.distillation.vision_teacher import TeacherSignals
from transmamba.errors import InputError

Metrics = Mapping[str, Tensor | float]


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with class numbers (batch,) or probabilities (batch, classes), the mean over the batch, fp32."""
    return cross_entropy(logits.float(), labels)


def soft_logit_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature^2 KL(teacher || student), the mean over the batch, fp32; logits (batch, classes)."""
    log_p = log_softmax(teacher.float() / temperature, dim=-1)
    log_q = log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * torch.sum(log_p.exp() * (log_p - log_q), dim=-1).mean()


def teacher_logits(teacher: TeacherSignals, logits: Tensor) -> Tensor:
    """The teacher's logits.

    Raises:
        InputError: it has none, or of other classes than the student.
    """
    if teacher.logits is None or teacher.logits.shape != logits.shape:
        classes = "no head" if teacher.logits is None else f"{teacher.logits.shape[1]} classes"
        raise InputError(
            f"the teacher has {classes} and the student {logits.shape[1]}; fine-tune the teacher on the same classes."
        )
    return teacher.logits


def share_of_step(batch: Mapping[str, Any]) -> Tensor | float:
    """Which share of an optimizer step's images this batch holds, so that accumulating gives the mean of all."""
    whole = batch.get("num_items_in_batch")
    return 1.0 if whole is None else torch.sum(batch["labels"] != -100) / whole
