"""ssd_step on a GPU, as two ops of torch, of which one writes the state where it has read it.

Gradients are those of the plain form: decoding, which the kernel is for, needs none.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from transmamba.ops.launching import readable
from transmamba.ops.plain_gradients import plain_gradients

from . import kernels
from .torch import ssd_step_torch

BLOCK_P = 32  # columns of a state per program: a batch of one with 16 heads of 96 is then 48 programs
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor dt, Tensor A, Tensor? D"


def ssd_step_triton(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (y, new state); see ssd_step."""
    return ssd_step_op(state, q, k, v, dt, A, D)


def ssd_step_in_place_triton(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (y, state), the state advanced where it lies."""
    if not state.is_contiguous():
        y, new_state = ssd_step_op(state, q, k, v, dt, A, D)
        return y, state.copy_(new_state)
    return ssd_step_in_place_op(state, q, k, v, dt, A, D), state


@torch.library.custom_op(
    "transmamba::ssd_step", mutates_args=(), schema=f"(Tensor state, {_INPUTS}) -> (Tensor, Tensor)"
)
def ssd_step_op(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    new_state = state.new_empty(state.shape, dtype=torch.float32)
    return _launch(state.contiguous(), q, k, v, dt, A, D, new_state), new_state


@ssd_step_op.register_fake
def _(state: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor]:
    return _output_like(state, q, v), state.new_empty(state.shape, dtype=torch.float32)


@torch.library.custom_op(
    "transmamba::ssd_step_", mutates_args=("state",), schema=f"(Tensor(a!) state, {_INPUTS}) -> Tensor"
)
def ssd_step_in_place_op(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor | None
) -> Tensor:
    return _launch(state, q, k, v, dt, A, D, state)


@ssd_step_in_place_op.register_fake
def _(state: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor | None) -> Tensor:
    return _output_like(state, q, v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    return plain_gradients(ssd_step_torch, ctx.saved_tensors, (dy, dstate))


ssd_step_op.register_autograd(_gradients, setup_context=_keep)


def _launch(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor | None, new_state: Tensor
) -> Tensor:
    q, k, v = map(readable, (q, k, v))
    rows, state_heads, n, p = state.shape
    y = _output_like(state, q, v)
    if y.numel() == 0:
        return y
    block_p = min(BLOCK_P, triton.next_power_of_2(p))
    block_n = triton.next_power_of_2(n)
    kernels.step_kernel[(rows * state_heads, -(-p // block_p))](
        state,
        q,
        k,
        v,
        dt,
        A.contiguous(),
        A if D is None else D.contiguous(),
        y,
        new_state,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *dt.stride(),
        state_heads,
        q.shape[1],
        k.shape[1],
        v.shape[1],
        dt.shape[1],
        n,
        p,
        READERS=y.shape[1] // state_heads,
        HAS_D=D is not None,
        BLOCK_N=block_n,
        BLOCK_P=block_p,
        num_warps=max(1, min(8, block_n * block_p // 512)),
    )
    return y


def _output_like(state: Tensor, q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], max(q.shape[1], state.shape[1]), v.shape[2])
