"""ssd_scan and memory_converter on a GPU, as ops of torch: shapes without values, and gradients.

torch.compile sees one node for each; a plain call in eager mode goes to the same functions without the registration.
`before` is what the output begins with (hybrid_mixer's attention), so that two modes write one tensor.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.ops.launching import goes_around_registration
from transmamba.ops.recomputation import recomputed
from transmamba.ops.rooms import Rooms

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
    rooms: Rooms | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final state); see ssd_scan. y begins with `before`, (batch, any length, heads, head_dim).

    rooms: that q, k and v were split by, if they are second parts.
    """
    borders = None if cu_seqlens is None else list(cu_seqlens)
    n, p = k.shape[-1], v.shape[-1]
    if n % SIZE_STEP or p % SIZE_STEP:
        q, k, v = (pad_columns(x) for x in (q, k, v))
        before = None if before is None else pad_columns(before)
        initial_state = None if initial_state is None else pad_state(initial_state)
        rooms = None
    inputs = (q, k, v, dt, A, D, initial_state, before)
    y, state, *_ = _call(ssd_scan_op, launches.run_scan, _Scan, inputs, borders, rooms)
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
    inputs = (k, v, dt, A, initial_state)
    state, *_ = _call(memory_converter_op, launches.run_converter, _Converter, inputs, borders)
    return state[..., :n, :p] if state.shape[-2] != n or state.shape[-1] != p else state


def pad_columns(x: Tensor) -> Tensor:
    """Zeros behind the last dimension, up to a size whose rows are aligned; they add nothing to any product."""
    missing = -x.shape[-1] % SIZE_STEP
    return torch.nn.functional.pad(x, (0, missing)) if missing else x  # a pad of nothing is a copy


def pad_state(x: Tensor) -> Tensor:
    """The same for both dimensions of a state."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % SIZE_STEP, 0, -x.shape[-2] % SIZE_STEP))


def _call(
    op: Any,
    run: Any,
    function: Any,
    tensors: tuple[Tensor | None, ...],
    borders: list[int] | None,
    rooms: Rooms | None = None,
) -> Any:
    """Call the registered op, or what it stands for where nobody would see the difference."""
    if not goes_around_registration(*tensors):
        return op(*tensors, borders)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return function.apply(rooms, *tensors, borders)
    return run(*tensors, borders)


ssd_scan_op = torch.library.custom_op(
    "transmamba::ssd_scan",
    lambda *inputs: tuple(launches.run_scan(*inputs)),
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor dt, Tensor A, Tensor? D, Tensor? initial_state, Tensor? before, "
    f"{_BORDERS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
ssd_scan_op.register_fake(lambda *inputs: tuple(launches.shapes_of_scan(*inputs)))

ssd_scan_backward_op = torch.library.custom_op(
    "transmamba::ssd_scan_backward",
    lambda *inputs: _apart(launches.run_scan_backward(*inputs)),
    mutates_args=(),
    schema="(Tensor dy, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor dt, Tensor A, Tensor? D, "
    f"Tensor? initial_state, Tensor entering, Tensor decays, {_BORDERS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@ssd_scan_backward_op.register_fake
def _(dy: Tensor, dfinal: Tensor | None, q: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    k, v, dt, A, D, initial_state, *_ = inputs
    return (*map(_like, (q, k, v, dt, A)), _like_or_none(D, q), _like_or_none(initial_state, q))


def _keep_scan(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    q, k, v, dt, A, D, initial_state, before, borders = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, dt, A, D, initial_state, *output[2:])
    ctx.offset = 0 if before is None else before.shape[1]
    ctx.has_before = before is not None
    ctx.borders = borders
    ctx.shape = output[0].shape
    ctx.rooms = None


def _scan_gradients(run: Any, ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: each reading may be a computation
    q, k, v, dt, _, D, initial_state = saved[:7]
    if dy is None:
        dy = v.new_zeros(ctx.shape)
    d_before, d_after = (dy[:, : ctx.offset], dy[:, ctx.offset :]) if ctx.has_before else (None, dy)
    rooms: tuple[Any, ...] = ()
    if ctx.rooms is not None:
        rooms = ([*ctx.rooms.make(q, k, v), torch.empty_like(dt, memory_format=torch.contiguous_format)],)
    gradients = run(d_after, dfinal, *saved, ctx.borders, *rooms)
    dq, dk, dv, ddt, dA, dD, dstate = gradients
    dD, dstate = (None if D is None else dD), (None if initial_state is None else dstate)
    return dq, dk, dv, ddt, dA, dD, dstate, d_before, None


ssd_scan_op.register_autograd(partial(_scan_gradients, ssd_scan_backward_op), setup_context=_keep_scan)


class _Scan(torch.autograd.Function):
    """The same gradients without the registration."""

    @staticmethod
    def forward(ctx: Any, rooms: Rooms | None, *inputs: Any) -> tuple[Tensor, ...]:
        output = recomputed(launches.run_scan, *inputs)
        _keep_scan(ctx, inputs, output)
        ctx.rooms = rooms
        return output[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return None, *_scan_gradients(launches.run_scan_backward, ctx, *gradients)


memory_converter_op = torch.library.custom_op(
    "transmamba::memory_converter",
    lambda *inputs: tuple(launches.run_converter(*inputs)),
    mutates_args=(),
    schema=f"(Tensor k, Tensor v, Tensor dt, Tensor A, Tensor? initial_state, {_BORDERS}) -> (Tensor, Tensor, Tensor)",
)
memory_converter_op.register_fake(lambda *inputs: tuple(launches.shapes_of_converter(*inputs)))

memory_converter_backward_op = torch.library.custom_op(
    "transmamba::memory_converter_backward",
    lambda *inputs: launches.run_converter_backward(*inputs),
    mutates_args=(),
    schema="(Tensor dfinal, Tensor k, Tensor v, Tensor dt, Tensor A, Tensor? initial_state, Tensor entering, "
    f"Tensor decays, {_BORDERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@memory_converter_backward_op.register_fake
def _(dfinal: Tensor, k: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    v, dt, A, initial_state, *_ = inputs
    return (*map(_like, (k, v, dt, A)), _like_or_none(initial_state, k))


def _keep_converter(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    *tensors, borders = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.borders = borders


def _converter_gradients(run: Any, ctx: Any, dfinal: Tensor, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    *gradients, dstate = run(dfinal, *saved, ctx.borders)
    return *gradients, None if saved[4] is None else dstate, None


memory_converter_op.register_autograd(
    partial(_converter_gradients, memory_converter_backward_op), setup_context=_keep_converter
)


class _Converter(torch.autograd.Function):
    """The same gradients without the registration."""

    @staticmethod
    def forward(ctx: Any, _: None, *inputs: Any) -> tuple[Tensor, ...]:
        output = recomputed(launches.run_converter, *inputs)
        _keep_converter(ctx, inputs, output)
        return output[:1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return None, *_converter_gradients(launches.run_converter_backward, ctx, *gradients)


def _apart(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same, with those of A and D, which come from one sum, in memory of their own, as torch asks of an op."""
    dq, dk, dv, ddt, dA, dD, dstate = gradients
    return dq, dk, dv, ddt, dA.clone(), dD.clone(), dstate


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _like_or_none(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if x is None else _like(x)
