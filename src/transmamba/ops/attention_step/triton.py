"""attention_step on a GPU, as an op of torch: two kernels whose shapes do not depend on the rows' lengths.

Gradients are those of the plain form: decoding, which the kernels are for, needs none.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from transmamba.ops.launching import readable
from transmamba.ops.plain_gradients import plain_gradients

from . import kernels
from .torch import attention_step_torch

INTERPRETED = not isinstance(kernels.attend_kernel, triton.JITFunction)  # whose products know no bf16
BLOCK_T = 64  # keys at a time
PROGRAMS = 528  # that a launch should have at least: four for each of 132 multiprocessors
MAX_PARTS = 64


def attention_step_triton(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Return the attention output; see attention_step."""
    return attention_step_op(q, keys, values, lengths)


@torch.library.custom_op("transmamba::attention_step", mutates_args=())
def attention_step_op(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    q, keys, values = map(readable, (q, keys, values))
    rows, heads, n = q.shape
    places, key_heads, p = keys.shape[1], keys.shape[2], values.shape[3]
    y = values.new_empty(rows, heads, p)
    if y.numel() == 0:
        return y
    num_parts = max(1, min(-(-PROGRAMS // (rows * key_heads)), -(-places // (2 * BLOCK_T)), MAX_PARTS))
    part_size = -(-places // (num_parts * BLOCK_T)) * BLOCK_T
    sums = q.new_empty(2, rows, heads, num_parts, dtype=torch.float32)
    parts = q.new_empty(rows, heads, num_parts, p, dtype=torch.float32)
    group = heads // key_heads
    block_p = max(16, triton.next_power_of_2(p))
    kernels.attend_kernel[(rows * key_heads, num_parts)](
        q,
        keys,
        values,
        lengths,
        parts,
        sums[0],
        sums[1],
        *q.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        key_heads,
        num_parts,
        part_size,
        n,
        p,
        n**-0.5,
        GROUP=group,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_T=BLOCK_T,
        BLOCK_N=max(16, triton.next_power_of_2(n)),
        BLOCK_P=block_p,
        WIDE=INTERPRETED or q.dtype == torch.float32,
        num_warps=4,
        num_stages=1 if q.dtype == torch.float32 else 3,
    )
    kernels.combine_kernel[(rows * heads,)](
        parts, sums[0], sums[1], y, num_parts, p, BLOCK_S=triton.next_power_of_2(num_parts), BLOCK_P=block_p
    )
    return y


@attention_step_op.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    return values.new_empty(*q.shape[:2], values.shape[3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return plain_gradients(attention_step_torch, ctx.saved_tensors, (dy,))


attention_step_op.register_autograd(_gradients, setup_context=_keep)
