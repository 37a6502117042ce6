"""Whether a student is its source: the largest difference of their logits while every TransPoint is None."""

import torch
from torch import Tensor, nn

from transmamba.errors import CheckpointError
from transmamba.models import TransMambaForCausalLM

LARGEST_DIFFERENCE = 1e-5  # relative, fp32; kernels that sum in another order differ by about 1e-6


def relative_logit_difference(source: nn.Module, student: TransMambaForCausalLM, tokens: Tensor) -> float:
    """Return max |student - source| / max |source| over the logits of tokens (batch, seq_len), every TransPoint None.

    Both run in their own dtype and keep their mode; the student's schedule is put back.
    """
    return relative_difference(logits_of(source, tokens), all_attention_logits(student, tokens))


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (batch, seq_len, vocab_size) in the model's dtype, on its device."""
    device = next(model.parameters()).device
    return model(input_ids=tokens.to(device), use_cache=False).logits


def all_attention_logits(student: TransMambaForCausalLM, tokens: Tensor) -> Tensor:
    """The student's logits with every TransPoint None; its schedule is put back."""
    schedule = student.config.schedule
    student.set_trans_points("transformer")
    try:
        return logits_of(student, tokens)
    finally:
        student.set_trans_points(schedule)


def relative_difference(exact: Tensor, found: Tensor) -> float:
    """Return max |found - exact| / max |exact|; exact must be finite."""
    check_finite(exact)
    exact, found = exact.cpu().double(), found.cpu().double()
    return ((found - exact).abs().max() / exact.abs().max()).item()


def check_finite(logits: Tensor) -> None:
    """Refuse logits of a source with which nothing can be compared."""
    if not logits.isfinite().all():
        raise CheckpointError("the source's logits are not finite; its weights are damaged or overflow.")
