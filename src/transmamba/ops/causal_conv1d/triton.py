"""causal_conv1d on a GPU: a kernel forward and one backward.

torch.compile sees one node for each; a plain call in eager mode goes to the same functions without the registration.
The final state is a copy of inputs and is taken in plain PyTorch; so is the initial state's gradient, of a few tokens.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.ops.launching import launch, on_its_device, readable, way_to_call

from . import kernels
from .torch import ConvWindow, depthwise_valid

# Segments and channels of a program, a thread then has 4 channels of a segment; and tokens of a segment. Backward, long
# ones: the last tokens of a segment are computed twice, and every program writes its part of the taps' gradient.
BLOCK_S, BLOCK_C = 8, 64
STEPS, STEPS_BACKWARD = 8, 16
PER_WARP = 128
MAX_KERNEL = 8  # taps are unrolled
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, int[]? borders, bool silu"


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    final_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return (y, final state); see causal_conv1d. Without final_state, an empty tensor in its place."""
    tensors = (x, weight, bias, initial_state)
    inputs = (*tensors, None if cu_seqlens is None else list(cu_seqlens), activation == "silu")
    y = way_to_call(causal_conv1d_op, _Convolution, run, *tensors)(*inputs)
    if not final_state:
        return y, x[:0]
    return y, last_inputs(x, weight.shape[1], initial_state, cu_seqlens)


def last_inputs(x: Tensor, kernel: int, initial_state: Tensor | None, cu_seqlens: Sequence[int] | None) -> Tensor:
    """The last kernel - 1 inputs of each row (document), the state before it included."""
    if cu_seqlens is None:
        few = x[:, max(0, x.shape[1] - kernel + 1) :]
        return ConvWindow.of(few, kernel, initial_state, None).final_state()
    return ConvWindow.of(x, kernel, initial_state, cu_seqlens).final_state()


@on_its_device
def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
    silu: bool,
) -> Tensor:
    """y, like x."""
    x, y = readable(x), x.new_empty(x.shape)
    if y.numel():
        tensors, strides, constants = _arguments(x, weight, bias, initial_state, borders, silu, STEPS)
        grid = (-(-x.shape[1] // (BLOCK_S * STEPS)), -(-x.shape[2] // BLOCK_C), x.shape[0])
        launch(kernels.forward_kernel, grid, (*tensors, y), (*x.shape[1:], *strides), constants)
    return y


@on_its_device
def run_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dstate), the last two empty where there is none."""
    dy, x = readable(dy), readable(x)
    (batch, tokens, channels), kernel = x.shape, weight.shape[1]
    dx = x.new_empty(x.shape)
    if x.numel():
        blocks = -(-tokens // (BLOCK_S * STEPS_BACKWARD))
        parts = x.new_empty(batch * blocks, kernel + 1, channels, dtype=torch.float32)
        tensors, strides, constants = _arguments(x, weight, bias, initial_state, borders, silu, STEPS_BACKWARD)
        numbers = (tokens, channels, *dy.stride()[:2], *strides, blocks)
        grid = (blocks, -(-channels // BLOCK_C), batch)
        launch(kernels.backward_kernel, grid, (dy, *tensors, dx, parts), numbers, constants)
        taps = parts.sum(0)
    else:
        taps = x.new_zeros(kernel + 1, channels, dtype=torch.float32)
    dweight = taps[:kernel].T.to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    dbias = x.new_empty(0) if bias is None else taps[kernel].to(bias.dtype, copy=True)
    state = initial_state
    dstate = x.new_empty(0) if state is None else state_gradient(dy, x, weight, bias, state, borders, silu)
    return dx, dweight, dbias, dstate


def state_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    borders: Sequence[int] | None,
    silu: bool,
) -> Tensor:
    """That of the initial state, which the first kernel - 1 tokens of each row (document) read."""
    past = weight.shape[1] - 1
    few, slope = (_first_tokens(x, past, len(state), borders) for x in (x, dy))
    weight = weight.float()
    if silu and past:
        total = depthwise_valid(torch.cat([state.float(), few], dim=1), weight, None if bias is None else bias.float())
        opening = torch.sigmoid(total)
        slope = slope * opening * (1 + total * (1 - opening))
    gradient = torch.zeros_like(slope)
    for m in range(past):  # place m is read by token j with the tap m - j
        for j in range(m + 1):
            gradient[:, m] += slope[:, j] * weight[:, m - j]
    return gradient.to(state.dtype)


def _first_tokens(x: Tensor, count: int, rows: int, borders: Sequence[int] | None) -> Tensor:
    """(rows, count, channels) in fp32; zeros where a row (document) is shorter."""
    first = x.new_zeros(rows, count, x.shape[2], dtype=torch.float32)
    if borders is None:
        first[:, : x.shape[1]] = x[:, :count]
        return first
    for row, (start, end) in enumerate(pairwise(borders)):
        first[row, : end - start] = x[0, start : min(end, start + count)]
    return first


causal_conv1d_op = torch.library.custom_op(
    "transmamba::causal_conv1d",
    lambda *inputs: run(*inputs),
    mutates_args=(),
    schema=f"({_INPUTS}) -> Tensor",
)
causal_conv1d_op.register_fake(lambda x, *_: x.new_empty(x.shape))

causal_conv1d_backward_op = torch.library.custom_op(
    "transmamba::causal_conv1d_backward",
    lambda *inputs: run_backward(*inputs),
    mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)


@causal_conv1d_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    optional = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, initial_state))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), *optional


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.borders, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(run_backward: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    found = run_backward(dy, *saved, ctx.borders, ctx.silu)
    return *(None if x is None else dx for x, dx in zip(saved, found, strict=True)), None, None


causal_conv1d_op.register_autograd(partial(_gradients, causal_conv1d_backward_op), setup_context=_keep)


class _Convolution(torch.autograd.Function):
    """The same gradients without the registration."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = run(*inputs)
        _keep(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _gradients(run_backward, ctx, dy)


def _arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
    silu: bool,
    steps: int,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """What both kernels take: tensors, strides, constants."""
    state = x if initial_state is None else readable(initial_state)
    weight = weight.contiguous()
    tables = _document_tables(None if borders is None else tuple(borders), x.device)
    tensors = (x, weight, weight if bias is None else bias.contiguous(), state, *tables)
    constants = {
        "KERNEL": weight.shape[1],
        "SILU": silu,
        "HAS_BIAS": bias is not None,
        "HAS_STATE": initial_state is not None,
        "PACKED": borders is not None,
        "STEPS": steps,
        "BLOCK_S": BLOCK_S,
        "BLOCK_C": BLOCK_C,
        "num_warps": max(1, BLOCK_S * BLOCK_C // PER_WARP),
        "num_stages": 2,
    }
    return tensors, (*x.stride()[:2], *state.stride()[:2]), constants


@lru_cache(maxsize=32)
def _document_tables(borders: tuple[int, ...] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """First token and number of every token's document, int32; tokens of whole rows need neither."""
    if borders is None:
        nothing = torch.zeros(1, dtype=torch.int32, device=device)
        return nothing, nothing
    lengths = torch.tensor([end - start for start, end in pairwise(borders)])
    documents = torch.arange(len(lengths)).repeat_interleave(lengths)
    starts = torch.tensor(borders[:-1])[documents]
    return starts.to(device, torch.int32), documents.to(device, torch.int32)
