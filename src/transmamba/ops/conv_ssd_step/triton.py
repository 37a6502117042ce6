"""conv_ssd_step on a GPU, as an op of torch that changes state and ring."""

import torch
import triton
from torch import Tensor

from transmamba.ops.launching import ALIGNMENT, chain_constants, readable

from . import kernels

BLOCK_P = 32  # columns of a state per program at most
LEAST_BLOCK_P = 8  # 32 bytes, which memory gives at once
WARP_ENTRIES = 4096  # of a state that a warp takes; with 64 rows or more, more warps are slower
FEW_PROGRAMS_ENTRIES = 512  # where programs are few, and wait for what they read
PROGRAMS = 132  # multiprocessors of a Hopper GPU; fewer programs than these take fewer columns each


def columns_of(states: int, p: int) -> int:
    """Columns of a state per program, a power of two: 16 heads of 96 are 192 programs of 8."""
    columns = min(BLOCK_P, triton.next_power_of_2(p))
    while columns > LEAST_BLOCK_P and states * -(-p // columns) < PROGRAMS:
        columns //= 2
    return columns


def warps_of(block_n: int, block_p: int) -> int:
    """Warps of a program; fastest of benchmarks/results/conv_ssd_step_launches_h200_2026-12-01.json."""
    entries = FEW_PROGRAMS_ENTRIES if block_p == LEAST_BLOCK_P else WARP_ENTRIES
    return max(1, min(8, block_n * block_p // entries))


@torch.library.custom_op(
    "transmamba::conv_ssd_step",
    mutates_args=("state", "ring"),
    schema="(Tensor(a!) state, Tensor(b!)? ring, Tensor positions, Tensor q, Tensor k, Tensor v, Tensor dt, Tensor? z, "
    "Tensor? weight, Tensor? bias, Tensor dt_bias, Tensor A_log, Tensor D) -> Tensor",
)
def conv_ssd_step_triton(
    state: Tensor,
    ring: Tensor | None,
    positions: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
) -> Tensor:
    """Return y and leave state and ring advanced; see conv_ssd_step."""
    q, k, v, dt = map(readable, (q, k, v, dt))
    z = None if z is None else readable(z)
    rows, state_heads, n, p = state.shape
    heads, key_heads = q.shape[1] // n, k.shape[1] // n
    y = q.new_empty(rows, heads * p)
    if y.numel() == 0:
        return y
    block_p, block_n = columns_of(rows * state_heads, p), triton.next_power_of_2(n)
    chain = chain_constants(q)
    kernels.conv_step_kernel[(rows * state_heads, -(-p // block_p))](
        state,
        state if ring is None else ring,
        positions,
        q,
        k,
        v,
        dt,
        q if z is None else z,
        q if weight is None else weight.contiguous(),
        q if bias is None else bias,
        dt_bias,
        A_log,
        D,
        y,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        dt.stride(0),
        0 if z is None else z.stride(0),
        y.stride(0),
        0 if ring is None else ring.stride(0),
        0 if ring is None else ring.stride(1),
        1 if ring is None else ring.shape[1],
        state_heads,
        key_heads,
        n,
        p,
        READERS=heads // state_heads,
        KERNEL=0 if weight is None else weight.shape[1],
        HAS_BIAS=bias is not None,
        HAS_GATE=z is not None,
        BLOCK_N=block_n,
        BLOCK_P=block_p,
        PREFETCH=state.data_ptr() % ALIGNMENT == 0 and n * p % 4 == 0,
        **chain,
        num_warps=warps_of(block_n, block_p),
    )
    return y


@conv_ssd_step_triton.register_fake
def _(state: Tensor, ring: Tensor | None, positions: Tensor, q: Tensor, *_: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] // state.shape[2] * state.shape[3])
