"""logit_distillation on a GPU: one kernel, as two ops of torch, of which one writes where it has read."""

import torch
import triton
from torch import Tensor

from . import kernels
from .torch import IGNORE_INDEX

LARGEST_BLOCK = 4096  # entries of a row at a time
_OPTIONS = "Tensor labels, Tensor? teacher, float temperature, float kl_weight, float ce_weight"


def logit_distillation_triton(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    *,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (kl, ce, gradient); see logit_gradient."""
    options = (labels, teacher, temperature, kl_weight, ce_weight)
    if overwrite and _readable(logits) is logits:
        return (*logit_distillation_in_place_op(logits, *options), logits)
    kl, ce, gradient = logit_distillation_op(logits, *options)
    return kl, ce, gradient


@torch.library.custom_op(
    "transmamba::logit_distillation", mutates_args=(), schema=f"(Tensor logits, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
def logit_distillation_op(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, temperature: float, kl_weight: float, ce_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _readable(logits)
    gradient = logits.new_empty(logits.shape)
    return (*_launch(logits, labels, teacher, temperature, kl_weight, ce_weight, gradient), gradient)


@logit_distillation_op.register_fake
def _(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, temperature: float, kl_weight: float, ce_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_sum(logits), _new_sum(logits), logits.new_empty(logits.shape)


@torch.library.custom_op(
    "transmamba::logit_distillation_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {_OPTIONS}) -> (Tensor, Tensor)",
)
def logit_distillation_in_place_op(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, temperature: float, kl_weight: float, ce_weight: float
) -> tuple[Tensor, Tensor]:
    return _launch(logits, labels, teacher, temperature, kl_weight, ce_weight, logits)


@logit_distillation_in_place_op.register_fake
def _(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, temperature: float, kl_weight: float, ce_weight: float
) -> tuple[Tensor, Tensor]:
    return _new_sum(logits), _new_sum(logits)


def _launch(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    """(kl, ce), and the gradient where it is asked for."""
    kl, ce = _new_sum(logits), _new_sum(logits)
    rows, size = logits.shape
    given = None if teacher is None else _readable(teacher)
    block = min(LARGEST_BLOCK, triton.next_power_of_2(size))
    if rows:
        kernels.logit_kernel[(rows,)](
            logits,
            labels.contiguous(),
            logits if given is None else given,
            gradient,
            kl,
            ce,
            logits.stride(0),
            0 if given is None else given.stride(0),
            gradient.stride(0),
            size,
            0 if given is None else min(size, given.shape[1]),
            1 / temperature,
            temperature**2,
            kl_weight * temperature,
            float(ce_weight),
            IGNORE=IGNORE_INDEX,
            TEACHER=given is not None,
            SOFT=temperature != 1 and given is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )
    return kl, ce


def _readable(x: Tensor) -> Tensor:
    """x itself where the entries of a row are neighbours, and no two rows are the same memory."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _new_sum(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)
