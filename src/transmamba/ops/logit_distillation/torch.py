"""logit_distillation in plain PyTorch: about eight elementwise passes over the logits.

Letters: r rows, v entries of the vocabulary, tau the temperature.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from transmamba.ops.heads import accumulation_dtype

IGNORE_INDEX = -100  # of labels; Hugging Face's convention


def logit_distillation_torch(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (kl, ce, gradient); see logit_gradient."""

    def target(log_q: Tensor) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        return compare_logits(teacher, log_q, temperature)

    return against(None if teacher is None else target, logits, labels, temperature, kl_weight, ce_weight)


def against(
    target: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for any teacher: target gives p, (r, v), and KL(p || q), (r,), for log q, (r, v), at temperature."""
    counts = labels != IGNORE_INDEX
    labelled = labels.clamp(min=0)[:, None]
    soft = logits.to(accumulation_dtype(logits), copy=temperature != 1)
    log_q = torch.log_softmax(soft, dim=-1)
    ce = -log_q.gather(1, labelled)[:, 0] * counts
    # d CE / d logits = q - one-hot; d (tau^2 KL) / d logits = tau (q - p), both softened
    if target is None or not kl_weight:
        gradient = log_q.exp().mul_(ce_weight)
    elif temperature == 1:
        gradient = log_q.exp().mul_(ce_weight + kl_weight)
    else:
        gradient = log_q.exp().mul_(ce_weight)
        log_q = torch.log_softmax(soft.div_(temperature), dim=-1)
        gradient.add_(log_q.exp(), alpha=kl_weight * temperature)
    kl = torch.zeros_like(ce)
    if target is not None and kl_weight:
        p, divergence = target(log_q)
        kl = temperature**2 * divergence * counts
        gradient.sub_(p, alpha=kl_weight * temperature)
    gradient.scatter_add_(1, labelled, torch.full_like(labelled, -ce_weight, dtype=gradient.dtype))
    return kl, ce, gradient.mul_(counts[:, None]).to(logits.dtype)


def compare_logits(teacher: Tensor, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return softmax(teacher / temperature), (r, v), and its KL from the student's log-probabilities, (r,)."""
    known = min(teacher.shape[1], student.shape[1])
    logits = teacher[:, :known].to(student.dtype)
    log_p = torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    p = log_p.exp()
    kl = torch.sum(p * log_p.sub_(student[:, :known]), dim=1)
    return (p if known == student.shape[1] else pad(p, (0, student.shape[1] - known))), kl
