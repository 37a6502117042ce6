"""What each stage minimises, as loss functions of the Trainer: `objective(model, batch) -> (loss, metrics)`.

A batch holds input_ids, position_ids and labels, (batch, seq_len) each, and num_items_in_batch, the number of predicted
tokens in the whole step, by which every sum is divided. `model` is the student, perhaps wrapped for several devices;
the TransPoints are those that the student has at the moment.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from transmamba.distillation.alignment import LayerErrors, suffix_mean
from transmamba.distillation.losses import logit_loss
from transmamba.distillation.signals import MixerSignal, mixer_signals, mixers_of, teacher_forced
from transmamba.distillation.teacher import Teacher
from transmamba.models import TransMambaForCausalLM
from transmamba.ops.logit_distillation import IGNORE_INDEX

Metrics = Mapping[str, Tensor | float]


class AlignmentObjective:
    """Bring each layer of the student near the teacher's, on the teacher's input: `errors` from its TransPoint on.

    teacher: the student's source in the student's own form, every TransPoint None; the student as it was converted.
    """

    def __init__(self, student: TransMambaForCausalLM, teacher: TransMambaForCausalLM, errors: LayerErrors) -> None:
        self.student = student
        self.teacher = teacher
        self.errors = errors
        self.teacher.set_trans_points("transformer")

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        theirs = mixer_signals(self.teacher, inputs)
        ours, theirs_of = mixers_of(self.student), mixers_of(self.teacher)
        errors: dict[int, Tensor] = {}

        def watch(layer: int, signal: MixerSignal) -> None:
            errors[layer] = self.errors(ours[layer], signal, theirs_of[layer], theirs[layer])

        with teacher_forced(self.student, theirs, watch):
            model(**inputs, use_cache=False, logits_to_keep=1)
        layout = theirs[0].layout
        counts = layout.pack((batch["labels"] != IGNORE_INDEX)[..., None])[..., 0]
        points = [mixer.trans_point for mixer in ours]
        total = suffix_mean([errors[layer] for layer in range(len(ours))], theirs, points, counts)
        return differentiable(total / items(batch), self.student), {}


class LogitObjective:
    """Bring the student's distribution of the next token near the teacher's, and near the text."""

    def __init__(
        self,
        student: TransMambaForCausalLM,
        teacher: Teacher,
        *,
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.temperature = temperature
        self.kl_weight = kl_weight
        self.ce_weight = ce_weight

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        labels = pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # of the place that predicts them
        counts = labels != IGNORE_INDEX
        target = self.teacher.target(dict(batch), counts)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        # Through the model's own forward, which wrappers for several devices need; one logit a row is made and dropped.
        outputs = model(**inputs, use_cache=False, logits_to_keep=1, output_hidden_states=True)
        loss, kl, ce = logit_loss(
            outputs.hidden_states[-1][counts],
            self.student.lm_head.weight,
            labels[counts],
            target,
            temperature=self.temperature,
            kl_weight=self.kl_weight,
            ce_weight=self.ce_weight,
        )
        here = counts.sum()
        return differentiable(loss / items(batch), self.student), {"kl": kl / here, "ce": ce / here}


def differentiable(loss: Tensor, student: nn.Module) -> Tensor:
    """The loss, with a gradient of 0 where nothing that is trained took part in it.

    So it is in a step whose documents all end before the first layer switches, while only the state space is trained.
    """
    if loss.requires_grad or not torch.is_grad_enabled():
        return loss
    trained = next((parameter for parameter in student.parameters() if parameter.requires_grad), None)
    return loss if trained is None else loss + 0 * trained.sum()


def items(batch: Mapping[str, Any]) -> Tensor | int:
    """By what a step's sums are divided: its predicted tokens, or those of this batch where nobody counted."""
    number = batch.get("num_items_in_batch")
    return torch.sum(batch["labels"][:, 1:] != IGNORE_INDEX) if number is None else number
