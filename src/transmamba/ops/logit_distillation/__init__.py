"""logit_distillation: cross-entropy and the divergence from a teacher, of logits that exist, with their gradient."""

from typing import NamedTuple

from torch import Tensor

from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_logits
from transmamba.ops.precision import outside_autocast

from .gradient import LogitDistillation, logit_gradient
from .reference import logit_distillation_reference
from .torch import IGNORE_INDEX, against, logit_distillation_torch

__all__ = [
    "IGNORE_INDEX",
    "LogitDistillation",
    "LogitLosses",
    "against",
    "logit_distillation",
    "logit_distillation_reference",
    "logit_distillation_torch",
    "logit_gradient",
]


class LogitLosses(NamedTuple):
    """What rows of logits lose, each (rows,), fp32 (fp64 for fp64 logits). Only `total` has a gradient."""

    total: Tensor
    kl: Tensor
    ce: Tensor


@outside_autocast
def logit_distillation(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    validate: bool = True,
    backend: str | None = None,
) -> LogitLosses:
    """Return kl_weight kl + ce_weight ce, and kl = tau^2 KL(p || q) and ce = -log q[label], row by row.

    p = softmax(teacher / tau), q = softmax(logits / tau), tau the temperature; ce has tau = 1.

    Args:
        logits: the student's, (rows, v).
        labels: (rows,), whole numbers below v; a row of label -100 loses nothing.
        teacher: the teacher's logits, (rows, v_t), or None: cross-entropy alone. Entries beyond the student's v are
            left out; where v_t < v, the teacher gives the others no probability. It gets no gradient, and without a
            kl_weight it is not read: kl is 0.
        temperature: above 0.
        validate: read the values on the CPU for NaN and labels out of range.
        backend: "reference" | "torch" | "triton" | None. The gradient is made with the loss, but by "reference".

    Raises:
        InputError: shapes, dtypes, devices or values that break the contract.

    Source: Hinton et al. 2015 (arXiv 1503.02531), section 2, for the factor tau^2.
    """
    check_logits(logits, labels, teacher, temperature, validate=validate)
    teacher = teacher if kl_weight else None
    options = (temperature, kl_weight, ce_weight)
    name = resolve_backend("logit_distillation", backend, logits, size=0)
    if name == "reference":
        kl, ce = logit_distillation_reference(logits, labels, teacher, temperature)
        return LogitLosses(kl_weight * kl + ce_weight * ce, kl.detach(), ce.detach())
    return LogitLosses(*LogitDistillation.apply(logits, labels, teacher, *options, name))
