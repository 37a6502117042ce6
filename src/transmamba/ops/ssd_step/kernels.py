"""The Triton kernel of ssd_step: a program advances some columns of one state and reads them out for all its heads."""

import triton
import triton.language as tl


@triton.jit
def step_kernel(
    state,
    q,
    k,
    v,
    dt,
    A,
    D,
    y,
    new_state,
    q_r,
    q_h,
    k_r,
    k_h,
    v_r,
    v_h,
    dt_r,
    dt_h,
    state_heads,
    q_heads,
    k_heads,
    v_heads,
    dt_heads,
    n,
    p,
    READERS: tl.constexpr,
    HAS_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """READERS: heads of the output that share a state. new_state may be state: each entry is read before it is written,
    by the program that writes it.
    """
    place = tl.program_id(0).to(tl.int64)
    row, s = place // state_heads, place % state_heads
    heads = state_heads * READERS
    i = tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = i < n, j < p
    step = tl.load(dt + row * dt_r + (s * dt_heads // state_heads) * dt_h).to(tl.float32)
    rate = tl.load(A + s * dt_heads // state_heads).to(tl.float32)
    key = tl.load(k + row * k_r + (s * k_heads // state_heads) * k_h + i, mask=in_n, other=0.0).to(tl.float32)
    value = tl.load(v + row * v_r + (s * v_heads // state_heads) * v_h + j, mask=in_p, other=0.0).to(tl.float32)
    at, inside = (place * n + i[:, None]) * p + j[None, :], in_n[:, None] & in_p[None, :]
    h = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
    h = tl.exp(step * rate) * h + key[:, None] * (step * value)[None, :]
    tl.store(new_state + at, h, mask=inside)
    for reader in tl.static_range(READERS):
        head = s * READERS + reader
        query = tl.load(q + row * q_r + (head * q_heads // heads) * q_h + i, mask=in_n, other=0.0).to(tl.float32)
        out = tl.sum(query[:, None] * h, axis=0)
        if HAS_D:
            skipped = tl.load(v + row * v_r + (head * v_heads // heads) * v_h + j, mask=in_p, other=0.0)
            out += tl.load(D + head).to(tl.float32) * skipped.to(tl.float32)
        tl.store(y + (row * heads + head) * p + j, out.to(y.dtype.element_ty), mask=in_p)
