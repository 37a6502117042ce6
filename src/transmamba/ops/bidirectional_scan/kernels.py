"""The Triton kernels of bidirectional_scan: what each chunk leaves, what enters each chunk, and the outputs.

Chunks are independent but for the recurrence between them, so one row fills a card. A program takes a chunk of one
head in one direction after the other, and convolves what it reads. Letters: L tokens of a chunk, P head_dim, which is
the state size too; a_t = dt_t A / ln 2; S the running sum of a within the chunk, U = S forward and a - S backward, so
that token i reads 2^(U_i - U_j) of token j before it in that direction. A state is P rows of P numbers, and with MEAN
one more row, which no query weighs. Derivation: docs/ops/bidirectional_scan.md.

Loops over directions and taps are loops of the GPU, and taps, which is KERNEL, is a number the compiler does not know:
unrolled, they are convolved in the layouts that products read, with the tokens of all taps in registers at once.
"""

import triton
import triton.language as tl

from transmamba.ops.selective_scan.kernels import softplus


@triton.jit
def rows_at(x, t, p, length, x_t):
    """These tokens of a row, fp32; 0 outside of it."""
    mask = ((t >= 0) & (t < length))[:, None]
    return tl.load(x + t.to(tl.int64)[:, None] * x_t + p[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def convolved(
    x,
    weight,
    bias,
    t,
    sign,
    p,
    length,
    x_t,
    taps,
    channels,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Tokens t convolved with those before them, of which sign says where they are: 1 or -1.

    weight (taps, channels), the tap of the token itself last.
    """
    total = rows_at(x, t, p, length, x_t)
    if KERNEL > 0:
        total *= tl.load(weight + (taps - 1) * channels + p).to(tl.float32)[None, :]
        if HAS_BIAS:
            total += tl.load(bias + p).to(tl.float32)[None, :]
        for tap in range(1, taps):
            w = tl.load(weight + (taps - 1 - tap) * channels + p).to(tl.float32)[None, :]
            total += rows_at(x, t - sign * tap, p, length, x_t) * w
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    return total


@triton.jit
def steps_at(dt, dt_bias, dt_bias_b, A_log, A_log_b, t, is_back, length, dt_t):
    """dt of tokens t, the sum of a over the chunk, and U; a is 0 outside of the row."""
    inside = t < length
    shift = tl.where(is_back, tl.load(dt_bias_b).to(tl.float32), tl.load(dt_bias).to(tl.float32))
    rate = tl.where(is_back, tl.load(A_log_b).to(tl.float32), tl.load(A_log).to(tl.float32))
    raw = tl.load(dt + t.to(tl.int64) * dt_t, mask=inside, other=0.0).to(tl.float32)
    step = tl.where(inside, softplus(raw + shift), 0.0)
    a = step * (tl.exp(rate) * -1.4426950408889634)
    S = tl.cumsum(a, axis=0)
    return step, tl.sum(a, axis=0), tl.where(is_back, a - S, S)


@triton.jit
def chunk_kernel(
    k,
    v,
    m,
    dt,
    weight,
    bias,
    dt_bias,
    dt_bias_b,
    A_log,
    A_log_b,
    lengths,
    left,
    decays,
    k_b,
    k_t,
    v_b,
    v_t,
    m_b,
    m_t,
    dt_b,
    dt_t,
    taps,
    tokens,
    chunks,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one chunk leaves to the next one of each direction: left (batch, chunks, 2, heads, rows, P) and the sums of
    a, decays (batch, chunks, 2, heads), both fp32.
    """
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    chunk = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = tokens
    if HAS_LENGTHS:
        length = tl.load(lengths + row).to(tl.int32)
    t = chunk * L + tl.arange(0, L)
    p = tl.arange(0, P)
    first = head * P
    width = heads * P
    k += row * k_b + first
    v += row * v_b + first
    dt += row * dt_b + head
    m_c = tl.zeros((L,), tl.float32)
    if MEAN:
        at = m + row * m_b + t.to(tl.int64) * m_t + head
        m_c = tl.load(at, mask=t < length, other=0.0).to(tl.float32)
    plane = (P + MEAN) * P
    for way in range(0, 2):
        sign = 1 - 2 * way
        is_back = head * 0 + way == 1  # a tensor for the interpreter too
        k_c = convolved(
            k,
            weight + width + first,
            bias + width + first,
            t,
            sign,
            p,
            length,
            k_t,
            taps,
            3 * width,
            KERNEL,
            HAS_BIAS,
            SILU,
        )
        v_c = convolved(
            v,
            weight + 2 * width + first,
            bias + 2 * width + first,
            t,
            sign,
            p,
            length,
            v_t,
            taps,
            3 * width,
            KERNEL,
            HAS_BIAS,
            SILU,
        )
        step, end, U = steps_at(
            dt + way * heads,
            dt_bias + head,
            dt_bias_b + head,
            A_log + head,
            A_log_b + head,
            t,
            is_back,
            length,
            dt_t,
        )
        written = v_c * (step * tl.exp2(tl.where(is_back, 0.0, end) - U))[:, None]
        h = tl.dot(tl.trans(k_c.to(DOT)), written.to(DOT), input_precision=PRECISION)
        place = ((row * chunks + chunk) * 2 + way) * heads + head
        tl.store(left + place * plane + p[:, None] * P + p[None, :], h)
        if MEAN:
            tl.store(left + place * plane + P * P + p, tl.sum(m_c[:, None] * written, axis=0))
        tl.store(decays + place, end)


@triton.jit
def enter_kernel(left, decays, entering, chunks, heads, plane, AHEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Carry a state over the chunks of one row: what enters each, entering like left.

    AHEAD chunks are read before the first of them is used, since each read takes as long as hundreds of sums.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    direction = tl.program_id(2) % 2
    row = (tl.program_id(2) // 2).to(tl.int64)
    mask = column < plane
    h = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks, AHEAD):
        kept, added = (), ()
        for i in tl.static_range(0, AHEAD):
            at = tl.minimum(first + i, chunks - 1)  # behind the last chunk nothing is written any more
            chunk = tl.where(direction == 0, at, chunks - 1 - at)
            place = ((row * chunks + chunk) * 2 + direction) * heads + head
            kept = kept + (tl.load(decays + place),)
            added = added + (tl.load(left + place * plane + column, mask=mask, other=0.0),)
        for i in tl.static_range(0, AHEAD):
            at = first + i
            chunk = tl.where(direction == 0, at, chunks - 1 - at)
            place = ((row * chunks + chunk) * 2 + direction) * heads + head
            inside = mask & (column + at < column + chunks)
            tl.store(entering + place * plane + column, h.to(entering.dtype.element_ty), mask=inside)
            h = h * tl.exp2(kept[i]) + added[i]


@triton.jit
def output_kernel(
    q,
    k,
    v,
    m,
    dt,
    gate,
    weight,
    bias,
    dt_bias,
    dt_bias_b,
    A_log,
    A_log_b,
    D,
    D_b,
    lengths,
    entering,
    y,
    q_b,
    q_t,
    k_b,
    k_t,
    v_b,
    v_t,
    m_b,
    m_t,
    dt_b,
    dt_t,
    gate_b,
    gate_t,
    taps,
    tokens,
    chunks,
    scale,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y (batch, tokens, heads P) of one chunk: the sum of both directions, through the gate."""
    head = tl.program_id(0)
    heads = tl.num_programs(0)
    chunk = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    length = tokens
    if HAS_LENGTHS:
        length = tl.load(lengths + row).to(tl.int32)
    within = tl.arange(0, L)
    t = chunk * L + within
    p = tl.arange(0, P)
    first = head * P
    width = heads * P
    q += row * q_b + first
    k += row * k_b + first
    v += row * v_b + first
    dt += row * dt_b + head
    m_c = tl.zeros((L,), tl.float32)
    if MEAN:
        at = m + row * m_b + t.to(tl.int64) * m_t + head
        m_c = tl.load(at, mask=t < length, other=0.0).to(tl.float32)
    plane = (P + MEAN) * P
    out = tl.zeros((L, P), tl.float32)
    for way in range(0, 2):
        sign = 1 - 2 * way
        is_back = head * 0 + way == 1  # a tensor for the interpreter too
        q_c = convolved(
            q,
            weight + first,
            bias + first,
            t,
            sign,
            p,
            length,
            q_t,
            taps,
            3 * width,
            KERNEL,
            HAS_BIAS,
            SILU,
        ).to(DOT)
        k_c = convolved(
            k,
            weight + width + first,
            bias + width + first,
            t,
            sign,
            p,
            length,
            k_t,
            taps,
            3 * width,
            KERNEL,
            HAS_BIAS,
            SILU,
        ).to(DOT)
        v_c = convolved(
            v,
            weight + 2 * width + first,
            bias + 2 * width + first,
            t,
            sign,
            p,
            length,
            v_t,
            taps,
            3 * width,
            KERNEL,
            HAS_BIAS,
            SILU,
        ).to(DOT)
        step, end, U = steps_at(
            dt + way * heads,
            dt_bias + head,
            dt_bias_b + head,
            A_log + head,
            A_log_b + head,
            t,
            is_back,
            length,
            dt_t,
        )
        state = entering + (((row * chunks + chunk) * 2 + way) * heads + head) * plane
        h = tl.load(state + p[:, None] * P + p[None, :])
        y_c = tl.dot(q_c, h.to(DOT), input_precision=PRECISION) * scale
        scores = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION) * scale
        if MEAN:
            y_c += tl.load(state + P * P + p).to(tl.float32)[None, :]
            scores += m_c[None, :]
        y_c *= tl.exp2(U + tl.where(is_back, end, 0.0))[:, None]
        order = within * sign
        past = order[:, None] >= order[None, :]
        scores *= tl.exp2(tl.where(past, U[:, None] - U[None, :], float("-inf"))) * step[None, :]
        # Here, so that v is needed in one layout only.
        skip = tl.where(is_back, tl.load(D_b + head).to(tl.float32), tl.load(D + head).to(tl.float32))
        scores += tl.where(order[:, None] == order[None, :], skip, 0.0)
        out += tl.dot(scores.to(DOT), v_c, acc=y_c, input_precision=PRECISION)

    inside = (t < tokens)[:, None]
    if HAS_GATE:
        z = gate + row * gate_b + t.to(tl.int64)[:, None] * gate_t + (first + p)[None, :]
        z = tl.load(z, mask=inside, other=0.0).to(tl.float32)
        out *= z / (1.0 + tl.exp(-z))
    out = tl.where((t < length)[:, None], out, 0.0)
    place_y = y + (row * tokens + t.to(tl.int64)[:, None]) * width + (first + p)[None, :]
    tl.store(place_y, out.to(y.dtype.element_ty), mask=inside)
