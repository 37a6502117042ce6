"""selective_scan on a GPU, as an op of torch: shapes without values, and gradients. torch.compile sees one node."""

from typing import Any

import torch
from torch import Tensor

from . import launches

_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"


def selective_scan_triton(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, last state); see selective_scan."""
    y, state, _ = selective_scan_op(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus)
    return y, state


@torch.library.custom_op(
    "transmamba::selective_scan_triton",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? initial_state, bool delta_softplus) -> (Tensor, Tensor, Tensor)",
)
def selective_scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return launches.run_scan(launches.Call.read(u, delta, A, B, C, D, z, delta_bias, delta_softplus), initial_state)


@selective_scan_op.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return launches.shapes_of_scan(u, A, B, C)


@torch.library.custom_op(
    "transmamba::selective_scan_triton_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? dlast, {_INPUTS}, Tensor? initial_state, Tensor entering, bool delta_softplus) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def selective_scan_backward_op(
    dy: Tensor,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    entering: Tensor,
    delta_softplus: bool,
) -> tuple[Tensor, ...]:
    call = launches.Call.read(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    found = launches.run_scan_backward(call, initial_state, entering, dy, dlast)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(
        gradient if x is None else gradient.reshape(x.shape).to(x.dtype)
        for x, gradient in zip(inputs, found, strict=True)
    )


@selective_scan_backward_op.register_fake
def _(dy: Tensor, dlast: Tensor | None, u: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs = (u, *rest[:8])  # to initial_state
    return tuple(u.new_empty(0, dtype=torch.float32) if x is None else _as_kernels_write(x) for x in inputs)


def _as_kernels_write(x: Tensor) -> Tensor:
    """An empty gradient of x, whose channels (of B and C: states) are neighbours in memory."""
    if x.dim() == 1:
        return x.new_empty(x.shape)
    *outer, channels, tokens = x.shape
    return x.new_empty(*outer, tokens, channels).transpose(-1, -2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *inputs, entering = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    gradients = selective_scan_backward_op(dy, dlast, *inputs, entering, ctx.delta_softplus)
    return *(None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=True)), None


selective_scan_op.register_autograd(_differentiate, setup_context=_keep)
