"""The gradient of logit_distillation, made together with its losses, by any backend."""

from typing import Any

import torch
from torch import Tensor

from transmamba.ops.backends import resolve_backend

from .reference import logit_distillation_reference
from .torch import logit_distillation_torch


def logit_gradient(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    *,
    overwrite: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (kl, ce, gradient of the total's sum in the logits' dtype), for callers that differentiate by hand.

    overwrite: the gradient may lie where the logits were; they are lost then.
    """
    teacher = teacher if kl_weight else None
    name = resolve_backend("logit_distillation", backend, logits, size=0)
    options = (temperature, kl_weight, ce_weight)
    if name == "triton":
        from .triton import logit_distillation_triton

        return logit_distillation_triton(logits, labels, teacher, *options, overwrite=overwrite)
    if name == "torch":
        return logit_distillation_torch(logits, labels, teacher, *options)
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        kl, ce = logit_distillation_reference(leaf, labels, teacher, temperature)
        (gradient,) = torch.autograd.grad((kl_weight * kl + ce_weight * ce).sum(), leaf)
    return kl.detach(), ce.detach(), gradient


class LogitDistillation(torch.autograd.Function):
    """(total, kl, ce), (rows,), of which total has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        teacher: Tensor | None,
        temperature: float,
        kl_weight: float,
        ce_weight: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kl, ce, gradient = logit_gradient(logits, labels, teacher, temperature, kl_weight, ce_weight, backend=backend)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_total[:, None].to(gradient.dtype), *([None] * 6)
