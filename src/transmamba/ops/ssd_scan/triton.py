"""ssd_scan and memory_converter on a GPU, as ops of torch: shapes without values, and gradients.

torch.compile sees one node for each. `before` is what the output begins with (hybrid_mixer's attention), so that two
modes write one tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launches

# Sizes of states and heads are brought to multiples of this: loads of single entries are slow, and on Hopper Triton 3.6
# compiled them into wrong gradients of q (bf16, sizes 20 and 37; docs/ops/ssd_scan.md).
SIZE_STEP = 16

_BORDERS = "int[]? borders"


def ssd_scan_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    before: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final state); see ssd_scan. y begins with `before`, (batch, any length, heads, head_dim)."""
    borders = None if cu_seqlens is None else list(cu_seqlens)
    n, p = k.shape[-1], v.shape[-1]
    if n % SIZE_STEP or p % SIZE_STEP:
        q, k, v = (pad_columns(x) for x in (q, k, v))
        before = None if before is None else pad_columns(before)
        initial_state = None if initial_state is None else pad_state(initial_state)
    y, state, _ = ssd_scan_op(q, k, v, dt, A, D, initial_state, before, borders)
    return (y[..., :p], state[..., :n, :p]) if y.shape[-1] != p or state.shape[-2] != n else (y, state)


def memory_converter_triton(
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Return the state after the prefix; see memory_converter."""
    borders = None if cu_seqlens is None else list(cu_seqlens)
    n, p = k.shape[-1], v.shape[-1]
    if n % SIZE_STEP or p % SIZE_STEP:
        k, v = pad_columns(k), pad_columns(v)
        initial_state = None if initial_state is None else pad_state(initial_state)
        return memory_converter_op(k, v, dt, A, initial_state, borders)[..., :n, :p]
    return memory_converter_op(k, v, dt, A, initial_state, borders)


def pad_columns(x: Tensor) -> Tensor:
    """Zeros behind the last dimension, up to a size whose rows are aligned; they add nothing to any product."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % SIZE_STEP))


def pad_state(x: Tensor) -> Tensor:
    """The same for both dimensions of a state."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % SIZE_STEP, 0, -x.shape[-2] % SIZE_STEP))


@torch.library.custom_op(
    "transmamba::ssd_scan",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor dt, Tensor A, Tensor? D, Tensor? initial_state, Tensor? before, "
    f"{_BORDERS}) -> (Tensor, Tensor, Tensor)",
)
def ssd_scan_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    before: Tensor | None,
    borders: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return launches.run_scan(q, k, v, dt, A, D, initial_state, before, borders)


@ssd_scan_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    before: Tensor | None,
    borders: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return launches.shapes_of_scan(q, k, v, dt, before, borders)


@torch.library.custom_op(
    "transmamba::ssd_scan_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor dt, Tensor A, Tensor? D, "
    f"Tensor? initial_state, Tensor entering, {_BORDERS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def ssd_scan_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    entering: Tensor,
    borders: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launches.run_scan_backward(dy, dfinal, q, k, v, dt, A, D, initial_state, entering, borders)


@ssd_scan_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    entering: Tensor,
    borders: Sequence[int] | None,
) -> tuple[Tensor, ...]:
    return (*map(_like, (q, k, v, dt, A)), _like_or_none(D, q), _like_or_none(initial_state, q))


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, dt, A, D, initial_state, before, borders = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, dt, A, D, initial_state, output[2])
    ctx.offset = 0 if before is None else before.shape[1]
    ctx.has_before = before is not None
    ctx.borders = borders
    ctx.shape = output[0].shape


def _scan_gradients(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, dentering: Tensor | None) -> tuple[Any, ...]:
    q, k, v, dt, A, D, initial_state, entering = ctx.saved_tensors
    if dy is None:
        dy = v.new_zeros(ctx.shape)
    d_before = dy[:, : ctx.offset] if ctx.has_before else None
    dq, dk, dv, ddt, dA, dD, dstate = ssd_scan_backward_op(
        dy[:, ctx.offset :], dfinal, q, k, v, dt, A, D, initial_state, entering, ctx.borders
    )
    dD, dstate = (None if D is None else dD), (None if initial_state is None else dstate)
    return dq, dk, dv, ddt, dA, dD, dstate, d_before, None


ssd_scan_op.register_autograd(_scan_gradients, setup_context=_keep_scan)


@torch.library.custom_op(
    "transmamba::memory_converter",
    mutates_args=(),
    schema=f"(Tensor k, Tensor v, Tensor dt, Tensor A, Tensor? initial_state, {_BORDERS}) -> Tensor",
)
def memory_converter_op(
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
) -> Tensor:
    return launches.run_converter(k, v, dt, A, initial_state, borders)


@memory_converter_op.register_fake
def _(
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
) -> Tensor:
    rows = k.shape[0] if borders is None else len(borders) - 1
    heads = max(k.shape[2], v.shape[2], dt.shape[2])
    return k.new_empty((rows, heads, k.shape[3], v.shape[3]), dtype=torch.float32)


@torch.library.custom_op(
    "transmamba::memory_converter_backward",
    mutates_args=(),
    schema="(Tensor dfinal, Tensor k, Tensor v, Tensor dt, Tensor A, Tensor? initial_state, "
    f"{_BORDERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def memory_converter_backward_op(
    dfinal: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launches.run_converter_backward(dfinal, k, v, dt, A, initial_state, borders)


@memory_converter_backward_op.register_fake
def _(
    dfinal: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
) -> tuple[Tensor, ...]:
    return (*map(_like, (k, v, dt, A)), _like_or_none(initial_state, k))


def _keep_converter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    k, v, dt, A, initial_state, borders = inputs
    ctx.save_for_backward(k, v, dt, A, initial_state)
    ctx.borders = borders


def _converter_gradients(ctx: Any, dfinal: Tensor) -> tuple[Any, ...]:
    k, v, dt, A, initial_state = ctx.saved_tensors
    dk, dv, ddt, dA, dstate = memory_converter_backward_op(dfinal, k, v, dt, A, initial_state, ctx.borders)
    return dk, dv, ddt, dA, None if initial_state is None else dstate, None


memory_converter_op.register_autograd(_converter_gradients, setup_context=_keep_converter)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _like_or_none(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if x is None else _like(x)
