"""The specification of causal_conv1d: one window of inputs per output."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final state); see causal_conv1d."""
    if cu_seqlens is not None:
        pieces = [
            causal_conv1d_reference(
                x[:, start:end],
                weight,
                bias,
                activation=activation,
                initial_state=None if initial_state is None else initial_state[i : i + 1],
            )
            for i, (start, end) in enumerate(pairwise(cu_seqlens))
        ]
        return torch.cat([y for y, _ in pieces], dim=1), torch.cat([state for _, state in pieces])
    kernel = weight.shape[1]
    past = x.new_zeros(x.shape[0], kernel - 1, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([past, x], dim=1)
    outputs = [torch.einsum("bkc,ck->bc", inputs[:, t : t + kernel], weight.to(x.dtype)) for t in range(x.shape[1])]
    y = torch.stack(outputs, dim=1) if outputs else x
    if bias is not None:
        y = y + bias.to(x.dtype)
    return torch.nn.functional.silu(y) if activation == "silu" else y, inputs[:, x.shape[1] :]
