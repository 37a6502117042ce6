"""The specification of logit_distillation: softmax, logarithm and sums as they are written, differentiable twice."""

import torch
from torch import Tensor

from transmamba.ops.heads import accumulation_dtype

from .torch import IGNORE_INDEX


def logit_distillation_reference(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return (kl, ce), (rows,); see logit_distillation."""
    dtype = accumulation_dtype(logits)
    student, counts = logits.to(dtype), labels != IGNORE_INDEX
    log_q = student - torch.logsumexp(student, dim=1, keepdim=True)
    ce = -torch.where(counts, log_q.gather(1, labels.clamp(min=0)[:, None])[:, 0], 0.0)
    if teacher is None:
        return torch.zeros_like(ce), ce
    known = min(teacher.shape[1], student.shape[1])
    soft, given = student / temperature, teacher[:, :known].detach().to(dtype) / temperature
    log_q = soft - torch.logsumexp(soft, dim=1, keepdim=True)
    log_p = given - torch.logsumexp(given, dim=1, keepdim=True)
    kl = torch.sum(log_p.exp() * (log_p - log_q[:, :known]), dim=1)
    return torch.where(counts, temperature**2 * kl, 0.0), ce
