"""Gradients of a kernel by way of the op's plain form, for ops that decode and so are seldom differentiated."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def plain_gradients(
    plain: Callable[..., Any], inputs: Sequence[Tensor | None], output_gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Compute `plain(*inputs)` again and return the gradient of every floating input, None for the others."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
        outputs = plain(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [(y, dy) for y, dy in zip(outputs, output_gradients, strict=True) if dy is not None]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    if not pairs:
        return (None,) * len(inputs)
    ys, dys = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, dys, materialize_grads=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in leaves)
