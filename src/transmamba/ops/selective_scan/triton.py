"""selective_scan on a GPU, as an op of torch: shapes without values, and gradients.

torch.compile sees one node; a plain call in eager mode goes to the same functions without the registration. The ops'
inputs are those of launches.Call, then the initial state and delta_softplus.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.ops.launching import on_its_device, way_to_call

from . import launches

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state"
)


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
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    y, state, *_ = way_to_call(selective_scan_op, _Scan, _run, *tensors)(*tensors, delta_softplus)
    return y, state


@on_its_device
def _run(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, initial_state, softplus = inputs
    return launches.run_scan(launches.Call.read(*(*tensors, softplus)), initial_state)


@on_its_device
def _run_backward(dy: Tensor, dlast: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    """Gradients in the inputs' shapes and dtypes and in the kernels' strides; of inputs that are absent, empty."""
    *tensors, entering, softplus = inputs
    call = launches.Call.read(*(*tensors[:-1], softplus))
    found = launches.run_scan_backward(call, tensors[-1], entering, dy, dlast)
    return tuple(
        gradient if x is None else gradient.reshape(x.shape).to(x.dtype)
        for x, gradient in zip(tensors, found, strict=True)
    )


selective_scan_op = torch.library.custom_op(
    "transmamba::selective_scan_triton",
    lambda *inputs: _run(*inputs),
    mutates_args=(),
    schema=f"({_INPUTS}, bool delta_softplus) -> (Tensor, Tensor, Tensor)",
)


@selective_scan_op.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return launches.shapes_of_scan(u, A, B, C)


selective_scan_backward_op = torch.library.custom_op(
    "transmamba::selective_scan_triton_backward",
    lambda *inputs: _run_backward(*inputs),
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? dlast, {_INPUTS}, Tensor entering, bool delta_softplus) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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


def _differentiate(run: Any, ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *inputs, entering = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    gradients = run(dy, dlast, *inputs, entering, ctx.delta_softplus)
    return *(None if x is None else gradient for x, gradient in zip(inputs, gradients, strict=True)), None


selective_scan_op.register_autograd(partial(_differentiate, selective_scan_backward_op), setup_context=_keep)


class _Scan(torch.autograd.Function):
    """The same gradients without the registration."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _run(*inputs)
        _keep(ctx, inputs, output)
        return output[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return _differentiate(_run_backward, ctx, *gradients)
