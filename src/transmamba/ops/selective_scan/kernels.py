"""The Triton kernels of selective_scan. A program carries the states of one block of channels over one segment.

Letters: T tokens of a step of the loop; D channels of a block, one for each of neighbouring threads; N states, of
which a thread holds NI, and NL threads together hold all. A tile is (NI, NL, D), which a warp holds as written here:
sums over states are additions within threads and log2(NL) exchanges between them, sums over channels log2(D) exchanges.

Channels are neighbours in memory, and so are states: u, delta, z, y (batch, tokens, channels), B, C (batch, groups,
tokens, states), states (..., N, channels), A (N, channels). Loads of T tokens come before their arithmetic, so that
one wait is for all. Derivation: docs/ops/selective_scan.md.
"""

import triton
import triton.language as tl

from transmamba.ops.ssd_scan.kernels import segment_of

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def places_of(NI: tl.constexpr, NL: tl.constexpr, D: tl.constexpr):
    """The states and channels of a tile, (NI, NL, 1) and (1, 1, D).

    Told that neighbours are not contiguous, the compiler leaves a tile as it is, and does not give threads four
    neighbouring channels each, for which it would have to move every tile before every sum.
    """
    n = tl.arange(0, NI)[:, None, None] * NL + tl.arange(0, NL)[None, :, None]
    d = tl.arange(0, D)[None, None, :]
    if NL > 1:
        n = tl.max_contiguous(n, [1, 1, 1])
    return n, tl.max_contiguous(d, [1, 1, 1])


@triton.jit
def load_states(place, of_n, EVEN: tl.constexpr):
    """B or C of one token; EVEN: a tile holds no states but the scan's, and nothing is to be masked."""
    if EVEN:
        states = tl.load(place)
    else:
        states = tl.load(place, mask=of_n, other=0.0)
    return states


@triton.jit
def over_states(x):
    return tl.sum(tl.sum(x, axis=0, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def over_channels(x, N: tl.constexpr, D: tl.constexpr):
    """Sums (N,) of a tile, which trades places first: states go to threads, and the channels to add into each thread.

    tl.split wants both halves in one thread, so that the compiler moves the tile there, once through shared memory;
    log2(D) exchanges of every state would cost four times as many instructions.
    """
    PARTS: tl.constexpr = 32 // N if N < 32 else 1  # threads to a state
    EACH: tl.constexpr = D // PARTS
    if EACH == 1:
        sums = tl.sum(tl.reshape(x, (N, D)), axis=1)
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, (N, PARTS, EACH // 2, 2)), (2, 1, 0, 3)))
        sums = tl.sum(tl.sum(even + odd, axis=0), axis=0)
    return sums


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to fp32's last bits for any x: the GPU's logarithm is inexact near 1, so log1p is a series."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)  # log(1 + e) = 2 artanh(s), and s <= 1/3: the terms left out are below 2^-29 of the sum
    q = s * s
    series = 2.0 / 13 + q * (2.0 / 15)
    series = 2.0 / 9 + q * (2.0 / 11 + q * series)
    series = 2.0 / 5 + q * (2.0 / 7 + q * series)
    series = 2.0 + q * (2.0 / 3 + q * series)
    return tl.maximum(x, 0.0) + s * series


@triton.jit
def raw_step(delta, bias):
    return delta.to(tl.float32) + bias


@triton.jit
def step_of(raw, inside, SOFTPLUS: tl.constexpr):
    """The step; 0 behind the end, which leaves the state as it is."""
    step = softplus(raw) if SOFTPLUS else raw
    return tl.where(inside, step, 0.0)


@triton.jit
def block_of(segments, index, channels, blocks, groups, D: tl.constexpr):
    """(segment, group, first channel, channels from there to the group's end) of a program."""
    block = index % blocks
    group = (index // blocks) % groups
    return index // (blocks * groups), group, group * channels + block * D, channels - block * D


@triton.jit
def scan_kernel(
    u,
    delta,
    A,
    B,
    C,
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
    u_t,
    delta_b,
    delta_t,
    B_b,
    B_g,
    B_t,
    C_b,
    C_g,
    C_t,
    z_b,
    z_t,
    y_b,
    y_t,
    dim,
    channels,
    blocks,
    groups,
    B_group,
    C_group,
    states,
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
    NL: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Carry states over a segment: h <- exp(step A) h + step u B, y = (C . h + D u) silu(z).

    ENTERING: start from `entering`, one state per segment, or with BY_ROW per row; zeros otherwise. STORE_Y: write y.
    STORE_CHUNKS: write the state that enters each T tokens. STORE_LEFT: write the state at the segment's end and the
    sum of its steps. STORE_END: write the state at the row's end.
    """
    segment, group, channel, rest = block_of(segments, tl.program_id(0), channels, blocks, groups, D)
    batch, start, count, first_chunk, row, _, is_last = segment_of(segments, segment)
    n, d = places_of(NI, NL, D)
    of_n, of_d = n < states, d < rest
    read = channel + tl.minimum(d, rest - 1)  # behind the group's end its last channel stands in, and is not written
    plane, tile = n.to(tl.int64) * dim + channel + d, n * D + d
    stored = of_n & of_d
    plane_size = tl.cast(states, tl.int64) * dim
    rate = tl.load(A + plane, mask=stored, other=0.0) * LOG2_E
    shift = tl.zeros((1, 1, D), tl.float32)
    if BIAS:
        shift = tl.load(bias + read).to(tl.float32)
    weight = tl.zeros((1, 1, D), tl.float32)
    if SKIP:
        weight = tl.load(skip + read).to(tl.float32)
    h = tl.zeros((NI, NL, D), tl.float32)
    if ENTERING:
        origin = row if BY_ROW else segment.to(tl.int64)
        h = tl.load(entering + origin * plane_size + plane, mask=stored, other=0.0)
    u += batch * u_b + start * u_t + read
    delta += batch * delta_b + start * delta_t + read
    z += batch * z_b + start * z_t + read
    y += batch * y_b + start * y_t + channel + d
    B += batch * B_b + (group // B_group).to(tl.int64) * B_g + start * B_t + n
    C += batch * C_b + (group // C_group).to(tl.int64) * C_g + start * C_t + n
    chunk_size = blocks * groups * (NI * NL * D)
    chunk_states += first_chunk * chunk_size + tl.program_id(0) % (blocks * groups) * (NI * NL * D) + tile
    steps = tl.zeros((1, 1, D), tl.float32)
    for first in range(0, count, T):
        u_s, step_s, B_s, C_s, z_s = (), (), (), (), ()
        for i in tl.static_range(T):
            # Behind the end the last token stands in: its step is 0.
            at = tl.minimum(i, count - 1 - first)
            u_s += (tl.load(u + at * u_t),)
            step_s += (tl.load(delta + at * delta_t),)
            B_s += (load_states(B + at * B_t, of_n, EVEN),)
            if STORE_Y:
                C_s += (load_states(C + at * C_t, of_n, EVEN),)
                if GATE:
                    z_s += (tl.load(z + at * z_t),)
        if STORE_CHUNKS:
            tl.store(chunk_states, h)
        for i in tl.static_range(T):
            t = first + i
            x = u_s[i].to(tl.float32)
            step = step_of(raw_step(step_s[i], shift), t < count, SOFTPLUS)
            h = h * tl.exp2(rate * step) + B_s[i] * (step * x)
            if STORE_LEFT:
                steps += step
            if STORE_Y:
                out = over_states(h * C_s[i])
                if SKIP:
                    out += weight * x
                if GATE:
                    gate = z_s[i].to(tl.float32)
                    out *= gate * tl.sigmoid(gate)
                tl.store(y + i * y_t, out.to(y.dtype.element_ty), mask=d < tl.where(t < count, rest, 0))
        u += T * u_t
        delta += T * delta_t
        B += T * B_t
        C += T * C_t
        z += T * z_t
        y += T * y_t
        chunk_states += chunk_size
    if STORE_LEFT:
        tl.store(left + segment.to(tl.int64) * plane_size + plane, h, mask=stored)
        tl.store(total + segment.to(tl.int64) * dim + channel + d, steps, mask=of_d)
    if STORE_END:
        if is_last != 0:
            tl.store(left + row * plane_size + plane, h, mask=stored)


@triton.jit
def costate_kernel(
    delta,
    A,
    C,
    z,
    bias,
    dy,
    left,
    segments,
    delta_b,
    delta_t,
    C_b,
    C_g,
    C_t,
    z_b,
    z_t,
    dy_b,
    dy_t,
    dim,
    channels,
    blocks,
    groups,
    C_group,
    states,
    SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr,
    GATE: tl.constexpr,
    T: tl.constexpr,
    NI: tl.constexpr,
    NL: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """What a segment adds to the gradient of the state that enters it: g <- exp(step A) (g + C dy), from its end."""
    segment, group, channel, rest = block_of(segments, tl.program_id(0), channels, blocks, groups, D)
    batch, start, count, _, _, _, _ = segment_of(segments, segment)
    n, d = places_of(NI, NL, D)
    of_n, of_d = n < states, d < rest
    read = channel + tl.minimum(d, rest - 1)  # behind the group's end its last channel stands in, and is not written
    plane = n.to(tl.int64) * dim + channel + d
    rate = tl.load(A + plane, mask=of_n & of_d, other=0.0) * LOG2_E
    shift = tl.zeros((1, 1, D), tl.float32)
    if BIAS:
        shift = tl.load(bias + read).to(tl.float32)
    delta += batch * delta_b + start * delta_t + read
    z += batch * z_b + start * z_t + read
    dy += batch * dy_b + start * dy_t + read
    C += batch * C_b + (group // C_group).to(tl.int64) * C_g + start * C_t + n
    g = tl.zeros((NI, NL, D), tl.float32)
    chunks = tl.cdiv(count, T)
    last = tl.cast((chunks - 1) * T, tl.int64)
    delta += last * delta_t
    z += last * z_t
    dy += last * dy_t
    C += last * C_t
    for j in range(0, chunks):
        first = (chunks - 1 - j) * T
        step_s, dy_s, C_s, z_s = (), (), (), ()
        for i in tl.static_range(T):
            # Behind the end the last token stands in: its step is 0.
            at = tl.minimum(i, count - 1 - first)
            step_s += (tl.load(delta + at * delta_t),)
            dy_s += (tl.load(dy + at * dy_t),)
            C_s += (load_states(C + at * C_t, of_n, EVEN),)
            if GATE:
                z_s += (tl.load(z + at * z_t),)
        for i in tl.static_range(T - 1, -1, -1):
            step = step_of(raw_step(step_s[i], shift), first + i < count, SOFTPLUS)
            read = tl.where(first + i < count, dy_s[i].to(tl.float32), 0.0)
            if GATE:
                gate = z_s[i].to(tl.float32)
                read *= gate * tl.sigmoid(gate)
            g = (g + C_s[i] * read) * tl.exp2(rate * step)
        delta -= T * delta_t
        z -= T * z_t
        dy -= T * dy_t
        C -= T * C_t
    tl.store(left + segment.to(tl.int64) * (tl.cast(states, tl.int64) * dim) + plane, g, mask=of_n & of_d)


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
    B,
    C,
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
    dB,
    dC,
    dskip,
    dbias,
    dentering,
    segments,
    u_b,
    u_t,
    delta_b,
    delta_t,
    B_b,
    B_g,
    B_t,
    C_b,
    C_g,
    C_t,
    z_b,
    z_t,
    dy_b,
    dy_t,
    tokens,
    dim,
    channels,
    blocks,
    groups,
    B_group,
    C_group,
    states,
    LEAVING: tl.constexpr,
    BY_ROW: tl.constexpr,
    STORE_ENTERING: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    GATE: tl.constexpr,
    T: tl.constexpr,
    NI: tl.constexpr,
    NL: tl.constexpr,
    D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Gradients of one block of channels over one segment, from its end, from the states that enter each T tokens.

    g is the gradient of a state. It starts from `leaving`, one per segment, or with BY_ROW per row; zeros otherwise.
    du, ddelta, dz (batch, tokens, dim). dB, dC (batch, groups, blocks, tokens, states): a part per block of channels.
    dA (segments, states, dim), dskip, dbias (segments, dim): a part per segment. dentering (rows, states, dim).
    """
    segment, group, channel, rest = block_of(segments, tl.program_id(0), channels, blocks, groups, D)
    block = tl.program_id(0) % blocks
    batch, start, count, first_chunk, row, is_first, _ = segment_of(segments, segment)
    n, d = places_of(NI, NL, D)
    of_n, of_d = n < states, d < rest
    read = channel + tl.minimum(d, rest - 1)  # behind the group's end its last channel stands in, and is not written
    plane, tile = n.to(tl.int64) * dim + channel + d, n * D + d
    stored = of_n & of_d
    plane_size = tl.cast(states, tl.int64) * dim
    rate = tl.load(A + plane, mask=stored, other=0.0)
    shift = tl.zeros((1, 1, D), tl.float32)
    if BIAS:
        shift = tl.load(bias + read).to(tl.float32)
    weight = tl.zeros((1, 1, D), tl.float32)
    if SKIP:
        weight = tl.load(skip + read).to(tl.float32)
    g = tl.zeros((NI, NL, D), tl.float32)
    if LEAVING:
        origin = row if BY_ROW else segment.to(tl.int64)
        g = tl.load(leaving + origin * plane_size + plane, mask=stored, other=0.0)
    u += batch * u_b + start * u_t + read
    delta += batch * delta_b + start * delta_t + read
    z += batch * z_b + start * z_t + read
    dy += batch * dy_b + start * dy_t + read
    B += batch * B_b + (group // B_group).to(tl.int64) * B_g + start * B_t + n
    C += batch * C_b + (group // C_group).to(tl.int64) * C_g + start * C_t + n
    written = (batch * tokens + start) * dim + channel + d
    du += written
    ddelta += written
    dz += written
    line = tl.arange(0, NI * NL)
    parts = (((batch * groups + group) * blocks + block) * tokens + start) * states + line
    dB += parts
    dC += parts
    chunk_size = blocks * groups * (NI * NL * D)
    chunk_states += first_chunk * chunk_size + tl.program_id(0) % (blocks * groups) * (NI * NL * D) + tile
    rate_sum = tl.zeros((NI, NL, D), tl.float32)
    skip_sum = tl.zeros((1, 1, D), tl.float32)
    bias_sum = tl.zeros((1, 1, D), tl.float32)
    chunks = tl.cdiv(count, T)
    last = tl.cast((chunks - 1) * T, tl.int64)
    u += last * u_t
    delta += last * delta_t
    z += last * z_t
    dy += last * dy_t
    B += last * B_t
    C += last * C_t
    du += last * dim
    ddelta += last * dim
    dz += last * dim
    dB += last * states
    dC += last * states
    chunk_states += tl.cast(chunks - 1, tl.int64) * chunk_size
    for j in range(0, chunks):
        chunk = chunks - 1 - j
        u_s, raw_s, step_s, z_s, dy_s = (), (), (), (), ()
        h_s = (tl.load(chunk_states),)
        for i in tl.static_range(T):
            at = tl.minimum(i, count - 1 - chunk * T)  # behind the end the last token stands in: its step is 0
            u_s += (tl.load(u + at * u_t),)
            raw_s += (tl.load(delta + at * delta_t),)
            dy_s += (tl.load(dy + at * dy_t),)
            if GATE:
                z_s += (tl.load(z + at * z_t),)
        for i in tl.static_range(T):
            at = tl.minimum(i, count - 1 - chunk * T)
            step = step_of(raw_step(raw_s[i], shift), chunk * T + i < count, SOFTPLUS)
            step_s += (step,)
            if i < T - 1:
                writes = load_states(B + at * B_t, of_n, EVEN)
                h_s += (h_s[i] * tl.exp2(rate * (step * LOG2_E)) + writes * (step * u_s[i].to(tl.float32)),)
        for i in tl.static_range(T - 1, -1, -1):
            t = chunk * T + i
            here, there = d < tl.where(t < count, rest, 0), line < tl.where(t < count, states, 0)
            x, step = u_s[i].to(tl.float32), step_s[i]
            at = tl.minimum(i, count - 1 - chunk * T)
            reads = load_states(C + at * C_t, of_n, EVEN)
            writes = load_states(B + at * B_t, of_n, EVEN)
            of_output = tl.where(here, dy_s[i].to(tl.float32), 0.0)
            remains = h_s[i] * tl.exp2(rate * (step * LOG2_E))
            h = remains + writes * (step * x)
            if GATE:
                gate = z_s[i].to(tl.float32)
                open_ = tl.sigmoid(gate)
                out = over_states(h * reads)
                if SKIP:
                    out += weight * x
                of_gate = of_output * out * (open_ * (1.0 + gate * (1.0 - open_)))
                tl.store(dz + i * dim, of_gate.to(dz.dtype.element_ty), mask=here)
                of_output *= gate * open_
            tl.store(dC + i * states, over_channels(h * of_output, NI * NL, D), mask=there)
            g += reads * of_output
            tl.store(dB + i * states, over_channels(g * (step * x), NI * NL, D), mask=there)
            of_written = over_states(g * writes)
            of_u = of_written * step
            if SKIP:
                of_u += weight * of_output
                skip_sum += of_output * x
            tl.store(du + i * dim, of_u.to(du.dtype.element_ty), mask=here)
            of_exponent = g * remains
            g *= tl.exp2(rate * (step * LOG2_E))
            rate_sum += of_exponent * step
            of_step = over_states(of_exponent * rate) + of_written * x
            if SOFTPLUS:
                of_step *= tl.sigmoid(raw_step(raw_s[i], shift))
            tl.store(ddelta + i * dim, of_step.to(ddelta.dtype.element_ty), mask=here)
            bias_sum += tl.where(t < count, of_step, 0.0)
        u -= T * u_t
        delta -= T * delta_t
        z -= T * z_t
        dy -= T * dy_t
        B -= T * B_t
        C -= T * C_t
        du -= T * dim
        ddelta -= T * dim
        dz -= T * dim
        dB -= T * states
        dC -= T * states
        chunk_states -= chunk_size
    tl.store(dA + segment.to(tl.int64) * plane_size + plane, rate_sum, mask=stored)
    if SKIP:
        tl.store(dskip + segment.to(tl.int64) * dim + channel + d, skip_sum, mask=of_d)
    if BIAS:
        tl.store(dbias + segment.to(tl.int64) * dim + channel + d, bias_sum, mask=of_d)
    if STORE_ENTERING:
        if is_first != 0:
            tl.store(dentering + row * plane_size + plane, g, mask=stored)
