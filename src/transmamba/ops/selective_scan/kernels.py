"""The Triton kernels of selective_scan. A program carries the states of one block of channels over one segment.

Letters: T tokens of a step of the loop. A program, one warp, holds N = NI * NL states of W = K * D channels: a thread
NI states of K channels, in registers, and NL * D = 32 threads the others. State l * NI + i of channel k * D + d is
entry (i, k, l, d) of a tile, (NI, K, NL, D), which the compiler spreads over a warp just so. What a token has per
channel, a (W,) vector, lies one channel to a thread. The ways from one to the other go through other threads, and are
few: `spread`, `along`, `over_states` and `over_channels`.

Channels are neighbours in memory, and so are states: u, delta, z, y (batch, tokens, channels), BC (batch, groups,
tokens, 2, N), which is B beside C, states (..., N, channels), A (N, channels). U_T and the like are from one token to
the next, and known to the compiler, so that the T tokens of a step need one address. What a step reads is loaded during
the one before it, as what a loop carries: else the compiler puts every load right before its use, and a warp waits at
each. Derivation: docs/ops/selective_scan.md.
"""

import triton
import triton.language as tl

from transmamba.ops.ssd_scan.kernels import segment_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def entries_of(NI: tl.constexpr, K: tl.constexpr, NL: tl.constexpr, D: tl.constexpr):
    """State and channel of the entries of a tile, as (NI * K, NL * D): registers and threads."""
    register, lane = tl.arange(0, NI * K)[:, None], tl.arange(0, NL * D)[None, :]
    return lane // D * NI + register // K, register % K * D + lane % D


@triton.jit
def load_tile(place, mask, NI: tl.constexpr, K: tl.constexpr, NL: tl.constexpr, D: tl.constexpr):
    return tl.reshape(tl.load(place, mask=mask, other=0.0), (NI, K, NL, D))


@triton.jit
def store_tile(place, x, mask, NI: tl.constexpr, K: tl.constexpr, NL: tl.constexpr, D: tl.constexpr):
    tl.store(place, tl.reshape(x, (NI * K, NL * D)), mask=mask)


@triton.jit
def load_tokens(place, STRIDE: tl.constexpr, last, T: tl.constexpr):
    """What T tokens have per channel, one after the other; behind the last one it stands in."""
    x = ()
    for i in tl.static_range(T):
        x += (tl.load(place + tl.minimum(i, last) * STRIDE),)
    return x


@triton.jit
def load_states(place, last, T: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr):
    """B and C of T tokens, (T * 2 * N,), as they lie; ALL: none is behind the last one, which else stands in."""
    i = tl.arange(0, T * 2 * N)
    if not ALL:
        i = tl.minimum(i // (2 * N), last) * (2 * N) + i % (2 * N)
    return tl.load(place + i)


@triton.jit
def along(x, T: tl.constexpr, NI: tl.constexpr, NL: tl.constexpr):
    """B and C of T tokens, (T * 2 * N,), as two tuples of (NI, 1, NL, 1): to the threads that hold the states."""
    tl.static_assert(T == 4)
    B, C = tl.split(tl.permute(tl.reshape(x, (2, 2, 2, NL, NI)), (4, 3, 1, 0, 2)))  # tokens as (odd, second half)
    B_first, B_second = tl.split(B)
    C_first, C_second = tl.split(C)
    B0, B1 = tl.split(B_first)
    B2, B3 = tl.split(B_second)
    C0, C1 = tl.split(C_first)
    C2, C3 = tl.split(C_second)
    B_s, C_s = (), ()
    for one in tl.static_range(T):
        B_s += (tl.reshape((B0, B1, B2, B3)[one], (NI, 1, NL, 1)),)
        C_s += (tl.reshape((C0, C1, C2, C3)[one], (NI, 1, NL, 1)),)
    return B_s, C_s


@triton.jit
def spread(x, K: tl.constexpr, NL: tl.constexpr, D: tl.constexpr):
    """(K * D,) as (1, K, NL, D): to all threads that hold states of the channel."""
    if NL > 1:
        i = tl.arange(0, K * NL * D)
        x = tl.gather(x, i // (NL * D) * D + i % D, 0)
    return tl.reshape(x, (1, K, NL, D))


@triton.jit
def over_states(x, S: tl.constexpr, K: tl.constexpr, NL: tl.constexpr, D: tl.constexpr):
    """Sums (K * D, S) of S tiles, given as (K, NL, D, S): what threads have summed over their own states.

    tl.split wants both halves in one thread, so that the compiler moves all that is to be added there, and each channel
    to one thread, once through shared memory. Sums by exchanges between threads would leave each in all of them.
    """
    if NL > 1:
        x = tl.permute(tl.reshape(x, (K, NL // 2, 2, D, S)), (1, 4, 0, 3, 2))
        even, odd = tl.split(x)
        x = tl.permute(tl.sum(even + odd, axis=0), (1, 2, 0))
    return tl.reshape(x, (K * D, S))


@triton.jit
def over_channels(x, S: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Sums (N, S) of S tiles, given as (N, D, S): what threads have summed over their own channels. See over_states."""
    PARTS: tl.constexpr = 32 // (N * S) if N * S < 32 else 1  # threads to a sum
    EACH: tl.constexpr = D // PARTS
    if EACH > 1:
        x = tl.permute(tl.reshape(x, (N, PARTS, EACH // 2, 2, S)), (2, 1, 0, 4, 3))
        even, odd = tl.split(x)
        sums = tl.sum(tl.sum(even + odd, axis=0), axis=0)
    else:
        sums = tl.sum(x, axis=1)
    return sums


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to fp32's last bits for any x: the GPU's logarithm is inexact near 1, so log1p is a series."""
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    s = e / (2.0 + e)  # log(1 + e) = 2 artanh(s), and s <= 1/3: the terms left out are below 2^-29 of the sum
    q = s * s
    series = 2.0 / 13 + q * (2.0 / 15)
    series = 2.0 / 9 + q * (2.0 / 11 + q * series)
    series = 2.0 / 5 + q * (2.0 / 7 + q * series)
    series = 2.0 + q * (2.0 / 3 + q * series)
    return tl.maximum(x, 0.0) + s * series


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def step_of(delta, shift, SOFTPLUS: tl.constexpr):
    raw = delta.to(tl.float32) + shift
    return softplus(raw) if SOFTPLUS else raw


@triton.jit
def block_of(segments, index, channels, blocks, groups, W: tl.constexpr):
    """(segment, group, first channel, channels from there to the group's end) of a program."""
    block = index % blocks
    group = (index // blocks) % groups
    return index // (blocks * groups), group, group * channels + block * W, channels - block * W


@triton.jit
def scan_kernel(
    u,
    delta,
    A,
    BC,
    skip,
    z,
    bias,
    entering,
    y,
    chunk_states,
    left,
    total,
    segments,
    u_b,
    delta_b,
    z_b,
    y_b,
    tokens,
    channels,
    blocks,
    groups,
    U_T: tl.constexpr,
    DELTA_T: tl.constexpr,
    Z_T: tl.constexpr,
    Y_T: tl.constexpr,
    DIM: tl.constexpr,
    STATES: tl.constexpr,
    ENTERING: tl.constexpr,
    BY_ROW: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    STORE_Y: tl.constexpr,
    STORE_CHUNKS: tl.constexpr,
    STORE_LEFT: tl.constexpr,
    STORE_END: tl.constexpr,
    T: tl.constexpr,
    NI: tl.constexpr,
    K: tl.constexpr,
    NL: tl.constexpr,
    D: tl.constexpr,
):
    """Carry states over a segment: h <- exp(step A) h + step u B, y = (C . h + D u) silu(z).

    ENTERING: start from `entering`, one state per segment, or with BY_ROW per row; zeros otherwise. STORE_Y: write y.
    STORE_CHUNKS: write the state that enters each T tokens, as tiles lie. STORE_LEFT: write the state at the segment's
    end and the sum of its steps. STORE_END: write the state at the row's end.
    """
    segment, group, channel, rest = block_of(segments, tl.program_id(0), channels, blocks, groups, K * D)
    batch, start, count, first_chunk, row, _, is_last = segment_of(segments, segment)
    n, d = entries_of(NI, K, NL, D)
    plane, stored = n.to(tl.int64) * DIM + channel + d, (n < STATES) & (d < rest)
    plane = tl.multiple_of(plane, [1, 1])
    d = tl.arange(0, K * D)
    read = channel + tl.minimum(d, rest - 1)  # behind the group's end its last channel stands in; what it gives is lost
    rate = load_tile(A + plane, stored, NI, K, NL, D) * LOG2_E
    shift = tl.zeros((K * D,), tl.float32)
    if BIAS:
        shift = tl.load(bias + read).to(tl.float32)
    weight = tl.zeros((K * D,), tl.float32)
    if SKIP:
        weight = tl.load(skip + read).to(tl.float32)
    h = tl.zeros((NI, K, NL, D), tl.float32)
    if ENTERING:
        origin = row if BY_ROW else segment.to(tl.int64)
        h = load_tile(entering + origin * (STATES * DIM) + plane, stored, NI, K, NL, D)
    u += batch * u_b + start * U_T
    delta += batch * delta_b + start * DELTA_T
    z += batch * z_b + start * Z_T
    y += batch * y_b + start * Y_T + channel
    BC += ((batch * groups + group) * tokens + start) * (2 * NI * NL)
    places = blocks * groups
    tile = tl.arange(0, NI * K)[:, None] * (NL * D) + tl.arange(0, NL * D)[None, :]
    tile = tl.multiple_of(tile, [1, 1])
    chunk_states += (first_chunk * places + tl.program_id(0) % places) * (NI * K * NL * D)
    steps = tl.zeros((K * D,), tl.float32)
    whole, tail = count // T, count % T
    u_s, step_s = load_tokens(u + read, U_T, count - 1, T), load_tokens(delta + read, DELTA_T, count - 1, T)
    BC_s, z_s = load_states(BC, count - 1, T, NI * NL, False), ()
    if STORE_Y and GATE:
        z_s = load_tokens(z + read, Z_T, count - 1, T)
    for TAIL in tl.static_range(2):  # first all whole T, of which nothing is to be masked
        for done in range(0, tl.minimum(tail, 1) if TAIL else whole):
            if TAIL:  # behind the end the last token stands in: its step is 0
                u_now = load_tokens(u + read, U_T, tail - 1, T)
                step_now = load_tokens(delta + read, DELTA_T, tail - 1, T)
                BC_now = load_states(BC, tail - 1, T, NI * NL, False)
                if STORE_Y and GATE:
                    z_now = load_tokens(z + read, Z_T, tail - 1, T)
            else:
                u_now, step_now, z_now, BC_now = u_s, step_s, z_s, BC_s
                ahead = tl.where(done + 1 < whole, T, 0)  # the last step loads itself again
                u_s = load_tokens(u + ahead * U_T + read, U_T, T - 1, T)
                step_s = load_tokens(delta + ahead * DELTA_T + read, DELTA_T, T - 1, T)
                BC_s = load_states(BC + ahead * (2 * NI * NL), T - 1, T, NI * NL, True)
                if STORE_Y and GATE:
                    z_s = load_tokens(z + ahead * Z_T + read, Z_T, T - 1, T)
            B_s, C_s = along(BC_now, T, NI, NL)
            if STORE_CHUNKS:
                tl.store(chunk_states + tile, tl.reshape(h, (NI * K, NL * D)))
            for i in tl.static_range(T):
                x = u_now[i].to(tl.float32)
                step = step_of(step_now[i], shift, SOFTPLUS)
                if TAIL:
                    step = tl.where(i < tail, step, 0.0)
                h = h * tl.exp2(rate * spread(step, K, NL, D)) + B_s[i] * spread(step * x, K, NL, D)
                if STORE_LEFT:
                    steps += step
                if STORE_Y:
                    out = tl.reshape(tl.sum(h * C_s[i], axis=0), (K, NL, D, 1))
                    out = tl.reshape(over_states(out, 1, K, NL, D), (K * D,))
                    if SKIP:
                        out += weight * x
                    if GATE:
                        gate = z_now[i].to(tl.float32)
                        out *= gate * sigmoid(gate)
                    here = d < (tl.where(i < tail, rest, 0) if TAIL else rest)
                    tl.store(y + i * Y_T + d, out.to(y.dtype.element_ty), mask=here)
            u += T * U_T
            delta += T * DELTA_T
            BC += T * (2 * NI * NL)
            z += T * Z_T
            y += T * Y_T
            chunk_states += places * (NI * K * NL * D)
    if STORE_LEFT:
        store_tile(left + segment.to(tl.int64) * (STATES * DIM) + plane, h, stored, NI, K, NL, D)
        tl.store(total + segment.to(tl.int64) * DIM + channel + d, steps, mask=d < rest)
    if STORE_END:
        if is_last != 0:
            store_tile(left + row * (STATES * DIM) + plane, h, stored, NI, K, NL, D)


@triton.jit
def costate_kernel(
    delta,
    A,
    BC,
    z,
    bias,
    dy,
    left,
    segments,
    delta_b,
    z_b,
    dy_b,
    tokens,
    channels,
    blocks,
    groups,
    DELTA_T: tl.constexpr,
    Z_T: tl.constexpr,
    DY_T: tl.constexpr,
    DIM: tl.constexpr,
    STATES: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr,
    GATE: tl.constexpr,
    T: tl.constexpr,
    NI: tl.constexpr,
    K: tl.constexpr,
    NL: tl.constexpr,
    D: tl.constexpr,
):
    """What a segment adds to the gradient of the state that enters it: g <- exp(step A) (g + C dy), from its end."""
    segment, group, channel, rest = block_of(segments, tl.program_id(0), channels, blocks, groups, K * D)
    batch, start, count, _, _, _, _ = segment_of(segments, segment)
    n, d = entries_of(NI, K, NL, D)
    plane, stored = n.to(tl.int64) * DIM + channel + d, (n < STATES) & (d < rest)
    plane = tl.multiple_of(plane, [1, 1])
    d = tl.arange(0, K * D)
    read = channel + tl.minimum(d, rest - 1)
    rate = load_tile(A + plane, stored, NI, K, NL, D) * LOG2_E
    shift = tl.zeros((K * D,), tl.float32)
    if BIAS:
        shift = tl.load(bias + read).to(tl.float32)
    tail = count % T
    end = start + (count - tail)
    delta += batch * delta_b + end * DELTA_T
    z += batch * z_b + end * Z_T
    dy += batch * dy_b + end * DY_T
    BC += ((batch * groups + group) * tokens + end) * (2 * NI * NL)
    g = tl.zeros((NI, K, NL, D), tl.float32)
    for WHOLE in tl.static_range(2):
        whole = count // T if WHOLE else tl.minimum(tail, 1)
        if WHOLE:
            back = tl.minimum(whole, 1) * T
            delta -= back * DELTA_T
            z -= back * Z_T
            dy -= back * DY_T
            BC -= back * (2 * NI * NL)
            step_s, dy_s = load_tokens(delta + read, DELTA_T, count - 1, T), load_tokens(dy + read, DY_T, count - 1, T)
            BC_s, z_s = load_states(BC, count - 1, T, NI * NL, False), ()
            if GATE:
                z_s = load_tokens(z + read, Z_T, count - 1, T)
        for done in range(0, whole):
            if WHOLE:
                step_now, dy_now, z_now, BC_now = step_s, dy_s, z_s, BC_s
                ahead = tl.where(done + 1 < whole, T, 0)
                delta -= ahead * DELTA_T
                z -= ahead * Z_T
                dy -= ahead * DY_T
                BC -= ahead * (2 * NI * NL)
                step_s, dy_s = load_tokens(delta + read, DELTA_T, T - 1, T), load_tokens(dy + read, DY_T, T - 1, T)
                BC_s = load_states(BC, T - 1, T, NI * NL, True)
                if GATE:
                    z_s = load_tokens(z + read, Z_T, T - 1, T)
            else:  # behind the end the last token stands in: its step is 0
                step_now = load_tokens(delta + read, DELTA_T, tail - 1, T)
                dy_now, BC_now = load_tokens(dy + read, DY_T, tail - 1, T), load_states(BC, tail - 1, T, NI * NL, False)
                if GATE:
                    z_now = load_tokens(z + read, Z_T, tail - 1, T)
            C_s = along(BC_now, T, NI, NL)[1]
            for i in tl.static_range(T - 1, -1, -1):
                step, of_output = step_of(step_now[i], shift, SOFTPLUS), dy_now[i].to(tl.float32)
                if not WHOLE:
                    step, of_output = tl.where(i < tail, step, 0.0), tl.where(i < tail, of_output, 0.0)
                if GATE:
                    gate = z_now[i].to(tl.float32)
                    of_output *= gate * sigmoid(gate)
                g = (g + C_s[i] * spread(of_output, K, NL, D)) * tl.exp2(rate * spread(step, K, NL, D))
    store_tile(left + segment.to(tl.int64) * (STATES * DIM) + plane, g, stored, NI, K, NL, D)


@triton.jit
def recur_kernel(
    left,
    total,
    A,
    outer,
    entering,
    first_of_row,
    dim,
    plane_size,
    REVERSE: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Carry states over the segments of a row, from `outer` or zeros; write what enters each."""
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = place < plane_size
    rate = tl.load(A + place, mask=mask, other=0.0) * LOG2_E
    first = tl.load(first_of_row + row)
    after = tl.load(first_of_row + row + 1)
    h = tl.zeros((BLOCK,), tl.float32)
    if OUTER:
        h = tl.load(outer + row.to(tl.int64) * plane_size + place, mask=mask, other=0.0)
    for i in range(0, after - first):
        segment = (after - 1 - i if REVERSE else first + i).to(tl.int64)
        tl.store(entering + segment * plane_size + place, h, mask=mask)
        steps = tl.load(total + segment * dim + place % dim, mask=mask, other=0.0)
        h = h * tl.exp2(rate * steps) + tl.load(left + segment * plane_size + place, mask=mask, other=0.0)


@triton.jit
def gradient_kernel(
    u,
    delta,
    A,
    BC,
    skip,
    z,
    bias,
    dy,
    chunk_states,
    leaving,
    du,
    ddelta,
    dz,
    dA,
    dBC,
    dskip,
    dbias,
    dentering,
    segments,
    u_b,
    delta_b,
    z_b,
    dy_b,
    tokens,
    dC_from_dB,
    channels,
    blocks,
    groups,
    U_T: tl.constexpr,
    DELTA_T: tl.constexpr,
    Z_T: tl.constexpr,
    DY_T: tl.constexpr,
    DIM: tl.constexpr,
    STATES: tl.constexpr,
    LEAVING: tl.constexpr,
    BY_ROW: tl.constexpr,
    STORE_ENTERING: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    T: tl.constexpr,
    NI: tl.constexpr,
    K: tl.constexpr,
    NL: tl.constexpr,
    D: tl.constexpr,
):
    """Gradients of one block of channels over one segment, from its end, from the states that enter each T tokens.

    g is the gradient of a state. It starts from `leaving`, one per segment, or with BY_ROW per row; zeros otherwise.
    du, ddelta, dz (batch, tokens, DIM). dBC (2, batch, groups, blocks, tokens, states): a part per block of channels.
    dA (segments, states, DIM), dskip, dbias (segments, DIM): a part per segment. dentering (rows, states, DIM).
    """
    segment, group, channel, rest = block_of(segments, tl.program_id(0), channels, blocks, groups, K * D)
    block = tl.program_id(0) % blocks
    batch, start, count, first_chunk, row, is_first, _ = segment_of(segments, segment)
    n, d = entries_of(NI, K, NL, D)
    plane, stored = n.to(tl.int64) * DIM + channel + d, (n < STATES) & (d < rest)
    plane = tl.multiple_of(plane, [1, 1])
    d = tl.arange(0, K * D)
    read = channel + tl.minimum(d, rest - 1)  # behind the group's end its last channel stands in, with dy = 0
    rate = load_tile(A + plane, stored, NI, K, NL, D) * LOG2_E
    shift = tl.zeros((K * D,), tl.float32)
    if BIAS:
        shift = tl.load(bias + read).to(tl.float32)
    weight = tl.zeros((K * D,), tl.float32)
    if SKIP:
        weight = tl.load(skip + read).to(tl.float32)
    g = tl.zeros((NI, K, NL, D), tl.float32)
    if LEAVING:
        origin = row if BY_ROW else segment.to(tl.int64)
        g = load_tile(leaving + origin * (STATES * DIM) + plane, stored, NI, K, NL, D)
    tail = count % T
    end = start + (count - tail)
    u += batch * u_b + end * U_T
    delta += batch * delta_b + end * DELTA_T
    z += batch * z_b + end * Z_T
    dy += batch * dy_b + end * DY_T
    BC += ((batch * groups + group) * tokens + end) * (2 * NI * NL)
    written = (batch * tokens + end) * DIM + channel
    du += written
    ddelta += written
    dz += written
    dBC += (((batch * groups + group) * blocks + block) * tokens + end) * STATES
    line = tl.arange(0, NI * NL)[:, None]  # entries (i, l) of what over_channels gives
    line = line % NL * NI + line // NL
    of_B_and_C = line + tl.arange(0, 2)[None, :] * tl.cast(dC_from_dB, tl.int64)
    places = blocks * groups
    tile = tl.arange(0, NI * K)[:, None] * (NL * D) + tl.arange(0, NL * D)[None, :]
    tile = tl.multiple_of(tile, [1, 1])
    chunk_states += ((first_chunk + count // T) * places + tl.program_id(0) % places) * (NI * K * NL * D)
    rate_sum = tl.zeros((NI, K, NL, D), tl.float32)
    skip_sum = tl.zeros((K * D,), tl.float32)
    bias_sum = tl.zeros((K * D,), tl.float32)
    for WHOLE in tl.static_range(2):  # last all whole T, of which no token is to be masked
        whole = count // T if WHOLE else tl.minimum(tail, 1)
        if WHOLE:
            back = tl.minimum(whole, 1) * T
            u -= back * U_T
            delta -= back * DELTA_T
            z -= back * Z_T
            dy -= back * DY_T
            BC -= back * (2 * NI * NL)
            u_s, delta_s = load_tokens(u + read, U_T, count - 1, T), load_tokens(delta + read, DELTA_T, count - 1, T)
            dy_s, BC_s = load_tokens(dy + read, DY_T, count - 1, T), load_states(BC, count - 1, T, NI * NL, False)
            z_s = ()
            if GATE:
                z_s = load_tokens(z + read, Z_T, count - 1, T)
        for done in range(0, whole):
            if WHOLE:
                u_now, delta_now, z_now, dy_now, BC_now = u_s, delta_s, z_s, dy_s, BC_s
                du -= T * DIM
                ddelta -= T * DIM
                dz -= T * DIM
                dBC -= T * STATES
                chunk_states -= places * (NI * K * NL * D)
                ahead = tl.where(done + 1 < whole, T, 0)  # the last step loads itself again
                u -= ahead * U_T
                delta -= ahead * DELTA_T
                z -= ahead * Z_T
                dy -= ahead * DY_T
                BC -= ahead * (2 * NI * NL)
                u_s, delta_s = load_tokens(u + read, U_T, T - 1, T), load_tokens(delta + read, DELTA_T, T - 1, T)
                dy_s, BC_s = load_tokens(dy + read, DY_T, T - 1, T), load_states(BC, T - 1, T, NI * NL, True)
                if GATE:
                    z_s = load_tokens(z + read, Z_T, T - 1, T)
            else:  # behind the end the last token stands in: its step is 0
                u_now = load_tokens(u + read, U_T, tail - 1, T)
                delta_now = load_tokens(delta + read, DELTA_T, tail - 1, T)
                dy_now = load_tokens(dy + read, DY_T, tail - 1, T)
                BC_now = load_states(BC, tail - 1, T, NI * NL, False)
                if GATE:
                    z_now = load_tokens(z + read, Z_T, tail - 1, T)
            B_s, C_s = along(BC_now, T, NI, NL)
            step_s = ()
            h_s = (tl.reshape(tl.load(chunk_states + tile), (NI, K, NL, D)),)
            for i in tl.static_range(T):
                step_s += (step_of(delta_now[i], shift, SOFTPLUS),)
                if i < T - 1:
                    moved = spread(step_s[i] * u_now[i].to(tl.float32), K, NL, D)
                    h_s += (h_s[i] * tl.exp2(rate * spread(step_s[i], K, NL, D)) + B_s[i] * moved,)
            for i in tl.static_range(T - 1, -1, -1):
                here = d < (rest if WHOLE else tl.where(i < tail, rest, 0))
                there = line < (STATES if WHOLE else tl.where(i < tail, STATES, 0))
                # Not the same number as above, for the compiler: it would keep the decays of T tokens in registers.
                x, step = u_now[i].to(tl.float32), tl.where(here, step_s[i], 0.0)
                of_output = tl.where(here, dy_now[i].to(tl.float32), 0.0)
                writes, reads = B_s[i], C_s[i]
                steps, moved = spread(step, K, NL, D), spread(step * x, K, NL, D)
                decay = tl.exp2(rate * steps)
                entered = h_s[i]
                if i == 0:  # read anew rather than kept since the chunk began
                    entered = tl.reshape(tl.load(chunk_states + tile), (NI, K, NL, D))
                remains = entered * decay
                if i == T - 1:
                    h = remains + writes * moved
                else:
                    h = h_s[i + 1]
                if GATE:
                    gate = z_now[i].to(tl.float32)
                    open_ = sigmoid(gate)
                    out = tl.reshape(tl.sum(h * reads, axis=0), (K, NL, D, 1))
                    out = tl.reshape(over_states(out, 1, K, NL, D), (K * D,))
                    if SKIP:
                        out += weight * x
                    of_gate = of_output * out * (open_ * (1.0 + gate * (1.0 - open_)))
                    tl.store(dz + i * DIM + d, of_gate.to(dz.dtype.element_ty), mask=here)
                    of_output *= gate * open_
                of_outputs = spread(of_output, K, NL, D)
                g += reads * of_outputs
                of_states = tl.join(tl.sum(g * moved, axis=1), tl.sum(h * of_outputs, axis=1))
                of_states = over_channels(tl.reshape(of_states, (NI * NL, D, 2)), 2, NI * NL, D)
                tl.store(dBC + i * STATES + of_B_and_C, of_states, mask=there)
                of_exponent = g * remains
                rate_sum += of_exponent * steps
                of_channels = tl.join(tl.sum(g * writes, axis=0), tl.sum(of_exponent * rate, axis=0))
                g *= decay
                of_written, of_step = tl.split(over_states(of_channels, 2, K, NL, D))
                of_u = of_written * step
                if SKIP:
                    of_u += weight * of_output
                    skip_sum += of_output * x
                tl.store(du + i * DIM + d, of_u.to(du.dtype.element_ty), mask=here)
                of_step = of_step * LN_2 + of_written * x
                if SOFTPLUS:
                    of_step *= sigmoid(delta_now[i].to(tl.float32) + shift)
                tl.store(ddelta + i * DIM + d, of_step.to(ddelta.dtype.element_ty), mask=here)
                bias_sum += tl.where(here, of_step, 0.0)
    store_tile(dA + segment.to(tl.int64) * (STATES * DIM) + plane, rate_sum, stored, NI, K, NL, D)
    if SKIP:
        tl.store(dskip + segment.to(tl.int64) * DIM + channel + d, skip_sum, mask=d < rest)
    if BIAS:
        tl.store(dbias + segment.to(tl.int64) * DIM + channel + d, bias_sum, mask=d < rest)
    if STORE_ENTERING:
        if is_first != 0:
            store_tile(dentering + row * (STATES * DIM) + plane, g, stored, NI, K, NL, D)
