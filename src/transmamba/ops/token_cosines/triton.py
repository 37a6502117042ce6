"""token_cosines on a GPU: a kernel forward, and one backward that computes the cosines again.

torch.compile sees one node for each; a plain call in eager mode goes to the same functions without the registration.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.ops.launching import launch, on_its_device, readable, way_to_call, whole_rows

from . import kernels
from .reference import EPS, LEAST_LENGTH

BLOCK_ENTRIES = 2048  # of each side in a program, which holds whole rows
MAX_SIZE = 8192  # of a row; registers hold no more


def token_cosines_triton(x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    """Return the cosines; see token_cosines."""
    return way_to_call(token_cosines_op, _Cosines, run, x, y, places)(x, y, places)


@on_its_device
def run(x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    """The cosines, (directions, batch, steps), fp32."""
    x, y = readable(x), readable(y)
    cosines = x.new_empty(x.shape[:3], dtype=torch.float32)
    if cosines.numel():
        grid, numbers, constants = _arguments(x, y)
        launch(kernels.cosine_kernel, grid, (x, y, places.contiguous(), cosines), numbers, constants)
    return cosines


@on_its_device
def run_backward(slopes: Tensor, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    """dx, dense."""
    x, y = readable(x), readable(y)
    dx = x.new_empty(x.shape)
    if slopes.numel():
        grid, numbers, constants = _arguments(x, y)
        tensors = (slopes.to(torch.float32).contiguous(), x, y, places.contiguous(), dx)
        launch(kernels.cosine_backward_kernel, grid, tensors, numbers, constants)
    return dx


def _arguments(x: Tensor, y: Tensor) -> tuple[tuple[int, int, int], tuple[int | float, ...], dict[str, Any]]:
    """What both kernels are launched with: the grid, their numbers and constants."""
    directions, batch, steps, width = x.shape
    block, constants = whole_rows(width, BLOCK_ENTRIES)
    rows = directions * batch * steps
    numbers = (rows, batch * steps, steps, width, *x.stride()[:3], *y.stride()[:2], EPS, LEAST_LENGTH)
    return (-(-rows // block), 1, 1), numbers, constants


token_cosines_op = torch.library.custom_op(
    "transmamba::token_cosines",
    lambda *inputs: run(*inputs),
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor places) -> Tensor",
)
token_cosines_backward_op = torch.library.custom_op(
    "transmamba::token_cosines_backward",
    lambda *inputs: run_backward(*inputs),
    mutates_args=(),
    schema="(Tensor slopes, Tensor x, Tensor y, Tensor places) -> Tensor",
)


@token_cosines_op.register_fake
def _(x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    return x.new_empty(x.shape[:3], dtype=torch.float32)


@token_cosines_backward_op.register_fake
def _(slopes: Tensor, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(run_backward: Any, ctx: Any, slopes: Tensor) -> tuple[Any, ...]:
    return run_backward(slopes, *ctx.saved_tensors), None, None


token_cosines_op.register_autograd(partial(_gradients, token_cosines_backward_op), setup_context=_keep)


class _Cosines(torch.autograd.Function):
    """The same gradients without the registration."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep(ctx, inputs, inputs[0])
        return run(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return _gradients(run_backward, ctx, gradients[0])
