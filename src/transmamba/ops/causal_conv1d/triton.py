"""causal_conv1d on a GPU: one kernel forward and two backward, as ops of torch.

The final state is a copy of inputs and is taken in plain PyTorch; so is the initial state's gradient, of a few tokens.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .torch import ConvWindow

BLOCK_T = 32
BLOCK_C = 64
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
    borders = None if cu_seqlens is None else list(cu_seqlens)
    y = causal_conv1d_op(x, weight, bias, initial_state, borders, activation == "silu")
    if not final_state:
        return y, x[:0]
    return y, last_inputs(x, weight.shape[1], initial_state, cu_seqlens)


def last_inputs(x: Tensor, kernel: int, initial_state: Tensor | None, cu_seqlens: Sequence[int] | None) -> Tensor:
    """The last kernel - 1 inputs of each row (document), the state before it included."""
    if cu_seqlens is None:
        few = x[:, max(0, x.shape[1] - kernel + 1) :]
        return ConvWindow.of(few, kernel, initial_state, None).final_state()
    return ConvWindow.of(x, kernel, initial_state, cu_seqlens).final_state()


@torch.library.custom_op("transmamba::causal_conv1d", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def causal_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
    silu: bool,
) -> Tensor:
    x, state = _readable(x), None if initial_state is None else _readable(initial_state)
    y = x.new_empty(x.shape)
    if y.numel():
        starts, documents = _tables(borders, x.device)
        kernels.forward_kernel[_grid(x)](
            x,
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            x if state is None else state,
            starts,
            documents,
            y,
            x.shape[1],
            x.shape[2],
            *x.stride()[:2],
            *y.stride()[:2],
            *((0, 0) if state is None else state.stride()[:2]),
            KERNEL=weight.shape[1],
            SILU=silu,
            HAS_BIAS=bias is not None,
            HAS_STATE=state is not None,
            PACKED=borders is not None,
            BLOCK_T=BLOCK_T,
            BLOCK_C=BLOCK_C,
        )
    return y


@causal_conv1d_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
    silu: bool,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "transmamba::causal_conv1d_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def causal_conv1d_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, the taps' and the bias's gradients as (kernel + 1, channels), the slope before SiLU), the last two fp32."""
    dy, x = _readable(dy), _readable(x)
    state = None if initial_state is None else _readable(initial_state)
    weight, (batch, tokens, channels), kernel = weight.contiguous(), x.shape, weight.shape[1]
    dx, slope = x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)
    if not x.numel():
        return dx, x.new_zeros(kernel + 1, channels, dtype=torch.float32), slope
    starts, documents = _tables(borders, x.device)
    grid = _grid(x)
    parts = x.new_empty(batch * grid[0], kernel + 1, channels, dtype=torch.float32)
    kernels.slope_kernel[grid](
        dy,
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        x if state is None else state,
        starts,
        documents,
        slope,
        parts,
        tokens,
        channels,
        *dy.stride()[:2],
        *x.stride()[:2],
        *((0, 0) if state is None else state.stride()[:2]),
        grid[0],
        KERNEL=kernel,
        SILU=silu,
        HAS_BIAS=bias is not None,
        HAS_STATE=state is not None,
        PACKED=borders is not None,
        BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C,
    )
    kernels.input_kernel[grid](
        slope,
        weight,
        starts,
        dx,
        tokens,
        channels,
        KERNEL=kernel,
        PACKED=borders is not None,
        BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C,
    )
    return dx, parts.sum(0), slope


@causal_conv1d_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    taps = x.new_empty(weight.shape[1] + 1, x.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape), taps, x.new_empty(x.shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, initial_state, borders, silu = inputs
    ctx.save_for_backward(x, weight, bias, initial_state)
    ctx.borders, ctx.silu = borders, silu


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, initial_state = ctx.saved_tensors
    dx, taps, slope = causal_conv1d_backward_op(dy, x, weight, bias, initial_state, ctx.borders, ctx.silu)
    kernel = weight.shape[1]
    dweight = taps[:kernel].T.to(weight.dtype)
    dbias = None if bias is None else taps[kernel].to(bias.dtype)
    dstate = None
    if initial_state is not None and ctx.needs_input_grad[3]:
        dstate = _state_gradient(slope, weight, initial_state, ctx.borders)
    return dx, dweight, dbias, dstate, None, None


def _state_gradient(slope: Tensor, weight: Tensor, state: Tensor, borders: Sequence[int] | None) -> Tensor:
    """Place m of a state is read by the token j of its document with the tap m - j, where j <= m."""
    kernel, length = weight.shape[1], slope.shape[1]
    first = slope.new_zeros(len(state), kernel - 1, slope.shape[2])  # slopes of each document's first tokens
    spans = [(0, length)] * len(state) if borders is None else list(pairwise(borders))
    if borders is None:
        count = min(kernel - 1, length)
        first[:, :count] = slope[:, :count]
    else:
        for row, (start, end) in enumerate(spans):
            count = min(kernel - 1, end - start)
            first[row, :count] = slope[0, start : start + count]
    gradient = torch.zeros_like(first)
    for m in range(kernel - 1):
        for j in range(m + 1):
            gradient[:, m] += first[:, j] * weight[:, m - j].to(first.dtype)
    return gradient.to(state.dtype)


causal_conv1d_op.register_autograd(_gradients, setup_context=_keep)


def _grid(x: Tensor) -> tuple[int, int, int]:
    return -(-x.shape[1] // BLOCK_T), -(-x.shape[2] // BLOCK_C), x.shape[0]


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tables(borders: Sequence[int] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    return _document_tables(None if borders is None else tuple(borders), device)


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
