"""Losses of distillation, as functions of tensors.

Sums over tokens, not means, in fp32 (fp64 for fp64 inputs), so that micro-batches and devices add up; dividing is the
caller's. Letters: r rows, one for each token that counts, v entries of the vocabulary, tau the temperature.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from transmamba.errors import InputError
from transmamba.ops.logit_distillation import against, logit_gradient

LOGITS_AT_ONCE = 1 << 26  # elements of one (r, v) tensor, 256 MiB in fp32; about five of them are alive at a time


@dataclass(frozen=True)
class DenseTarget:
    """A teacher at hand: hidden (rows, hidden_size), its head (v or more, hidden_size), bias (v or more,).

    Entries of the teacher's vocabulary beyond the student's are padding and are left out.
    """

    hidden: Tensor
    head: Tensor
    bias: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def logits(self, rows: slice) -> Tensor:
        """The teacher's logits of these rows, (r, v or more)."""
        return linear(self.hidden[rows], self.head, self.bias)


@dataclass(frozen=True)
class GivenTarget:
    """A teacher whose logits, (rows, v or more), exist already."""

    all_logits: Tensor

    def __len__(self) -> int:
        return len(self.all_logits)

    def logits(self, rows: slice) -> Tensor:
        """The teacher's logits of these rows, (r, v or more)."""
        return self.all_logits[rows]


@dataclass(frozen=True)
class TopKTarget:
    """A teacher of which the k most probable tokens were stored: ids and log_probs (rows, k), at `temperature`.

    The rest of its probability is one event, "another token". The divergence between the distributions over these
    k + 1 events is never above that over the vocabulary.
    """

    ids: Tensor
    log_probs: Tensor
    temperature: float

    def __len__(self) -> int:
        return len(self.ids)

    def compare(self, rows: slice, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the teacher's distribution (r, v) and KL(teacher || student), (r,), of these rows.

        student: the student's log-probabilities at this temperature, (r, v).
        """
        if temperature != self.temperature:
            raise InputError(
                f"temperature={temperature:g} differs from {self.temperature:g}, at which the teacher's logits were "
                "stored; use that, or store them anew."
            )
        ids, log_top = self.ids[rows].long(), self.log_probs[rows].to(student.dtype)
        top, student_top = log_top.exp(), student.gather(1, ids)
        smallest = torch.finfo(student.dtype).eps  # of a sum near 1: below it, "another token" is rounding
        rest = (1 - top.sum(1)).clamp(min=smallest)
        student_rest = (1 - student_top.exp().sum(1)).clamp(min=smallest)
        kl = torch.sum(top * (log_top - student_top), dim=1) + rest * (rest.log() - student_rest.log())
        # The gradient of "another token" is that of a teacher who shares its rest out as the student does.
        target = student.exp() * (rest / student_rest)[:, None]
        return target.scatter(1, ids, top), kl


LogitTarget = DenseTarget | GivenTarget | TopKTarget  # what a teacher says of the next token, for the rows of a batch


def logit_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    target: LogitTarget,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return kl_weight KL + ce_weight CE summed over rows, with its gradient, and both sums by themselves, without.

    KL is temperature^2 KL(teacher || student) with both softened by the temperature; CE is the cross-entropy of the
    labels at temperature 1. Logits exist for some rows at a time: at most `logits_at_once` of them, whatever the
    batch and the vocabulary.

    Args:
        hidden: the student's last hidden states, (rows, hidden_size).
        head: the student's output embedding, (v, hidden_size).
        labels: the next tokens, (rows,); -100 counts for nothing, neither in KL nor in CE.
        target: the teacher, for the same rows.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2, for the factor temperature^2.
    """
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature={temperature} must be above 0; 1 compares the distributions as they are.")
    if len(target) != len(hidden) or len(labels) != len(hidden):
        raise InputError(
            f"hidden has {len(hidden)} rows, labels {len(labels)} and the teacher {len(target)}; give one of each "
            "for every token that counts."
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, head = hidden.to(dtype), head.to(dtype)
    with torch.autocast(device, enabled=False):
        result = _LogitLoss.apply(hidden, head, labels, target, temperature, kl_weight, ce_weight, logits_at_once)
    return result[0], result[1], result[2]


class _LogitLoss(torch.autograd.Function):
    """The gradient is made with the loss, chunk by chunk, so that no logits are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        target: LogitTarget,
        temperature: float,
        kl_weight: float,
        ce_weight: float,
        logits_at_once: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head, dtype=dtype) if needs_head else None
        kl_sum, ce_sum = hidden.new_zeros((), dtype=dtype), hidden.new_zeros((), dtype=dtype)
        step = max(1, logits_at_once // max(1, len(head)))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            kl, ce, gradient = _of_logits(
                linear(hidden[rows], head), labels[rows], target, rows, temperature, kl_weight, ce_weight
            )
            kl_sum, ce_sum = kl_sum + kl.sum(), ce_sum + ce.sum()
            if d_hidden is not None:
                d_hidden[rows] = gradient @ head
            if d_head is not None:
                d_head += (gradient.T @ hidden[rows]).to(dtype)
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        total = kl_weight * kl_sum + ce_weight * ce_sum
        ctx.mark_non_differentiable(kl_sum, ce_sum)
        return total, kl_sum, ce_sum

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_total.to(d_hidden.dtype),
            None if d_head is None else d_head * d_total.to(d_head.dtype),
            *([None] * 6),
        )


def _of_logits(
    logits: Tensor,
    labels: Tensor,
    target: LogitTarget,
    rows: slice,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """KL and CE of these rows, (r,), and the gradient of their logits, which may lie where the logits were."""
    if not isinstance(target, TopKTarget):
        teacher = target.logits(rows) if kl_weight else None
        return logit_gradient(logits, labels, teacher, temperature, kl_weight, ce_weight, overwrite=True)

    def of_student(log_q: Tensor) -> tuple[Tensor, Tensor]:
        return target.compare(rows, log_q, temperature)

    return against(of_student, logits, labels, temperature, kl_weight, ce_weight)
