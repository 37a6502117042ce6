"""The Triton kernel of conv_ssd_step: a program takes some columns of one state, and the channels these depend on.

All that it reads is asked for before anything is computed, and weights before the kernels ahead are done, see
ops/chain. The state is not: another call may be about to write it, so it only comes into the L2 cache by then.
"""

import triton
import triton.language as tl

from transmamba.ops.chain.kernels import prefetch, wait_for_the_chain


@triton.jit
def taps_of(weight, bias, channel, inside, KERNEL: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Weights of the convolution at some channels, that of the present input first, then the bias."""
    taps = ()
    for tap in tl.static_range(KERNEL):
        taps += (tl.load(weight + channel * KERNEL + (KERNEL - 1 - tap), mask=inside, other=0.0),)
    if HAS_BIAS:
        taps += (tl.load(bias + channel, mask=inside, other=0.0),)
    return taps


@triton.jit
def past_of(ring, channel, inside, position, slots, ring_t, KERNEL: tl.constexpr):
    """The convolution's earlier inputs at some channels, the last one first."""
    past = ()
    for tap in tl.static_range(1, KERNEL):
        past += (tl.load(ring + (position + slots - tap) % slots * ring_t + channel, mask=inside, other=0.0),)
    return past


@triton.jit
def convolved(
    x,
    past,
    taps,
    ring,
    channel,
    position,
    slots,
    ring_t,
    written,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """SiLU of the convolution at some channels, whose inputs now are x, in fp32. The place that is written is that of
    the input `slots` tokens ago, which no program reads, so that all may write what they need at any time.
    """
    total = x.to(tl.float32) * taps[0].to(tl.float32)
    for tap in tl.static_range(1, KERNEL):
        total += past[tap - 1].to(tl.float32) * taps[tap].to(tl.float32)
    if HAS_BIAS:
        total += taps[KERNEL].to(tl.float32)
    tl.store(ring + (position % slots) * ring_t + channel, x, mask=written)
    return total / (1.0 + tl.exp(-total))


@triton.jit
def conv_step_kernel(
    state,
    ring,
    positions,
    q,
    k,
    v,
    dt,
    z,
    weight,
    bias,
    dt_bias,
    A_log,
    D,
    y,
    q_r,
    k_r,
    v_r,
    dt_r,
    z_r,
    y_r,
    ring_r,
    ring_t,
    slots,
    state_heads,
    key_heads,
    n,
    p,
    READERS: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHAINED: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """READERS: query heads of a state. KERNEL: taps, 0 without a convolution."""
    place = tl.program_id(0).to(tl.int64)
    row, s = place // state_heads, place % state_heads
    i = tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = i < n, j < p
    group = s * key_heads // state_heads
    widths = state_heads * READERS * n  # channels of q, before those of k
    at_k, at_v = widths + group * n + i, widths + key_heads * n + group * p + j
    position = tl.load(positions + row)
    first = i < n * (1 - tl.minimum(tl.program_id(1), 1))  # the first program of a state writes q and k
    bias_dt, log_A = tl.load(dt_bias + s).to(tl.float32), tl.load(A_log + s).to(tl.float32)
    q_taps, skips = (), ()
    for reader in tl.static_range(READERS):
        skips += (tl.load(D + s * READERS + reader).to(tl.float32),)
        if KERNEL > 0:
            channel = (s * READERS + reader) * n + i
            q_taps += (taps_of(weight, bias, channel, in_n, KERNEL=KERNEL, HAS_BIAS=HAS_BIAS),)
    if KERNEL > 0:
        ring += row * ring_r
        k_taps = taps_of(weight, bias, at_k, in_n, KERNEL=KERNEL, HAS_BIAS=HAS_BIAS)
        v_taps = taps_of(weight, bias, at_v, in_p, KERNEL=KERNEL, HAS_BIAS=HAS_BIAS)
    if CHAINED:
        if PREFETCH:
            share = tl.cdiv(n * p * 4, tl.num_programs(1) * 128) * 128  # of a state, among its programs
            start = tl.minimum(tl.program_id(1) * share, n * p * 4)
            prefetch((state + place * n * p).to(tl.int64) + start, tl.minimum(share, n * p * 4 - start))
        wait_for_the_chain()
    at, inside = (place * n + i[:, None]) * p + j[None, :], in_n[:, None] & in_p[None, :]
    key = tl.load(k + row * k_r + group * n + i, mask=in_n, other=0.0)
    value = tl.load(v + row * v_r + group * p + j, mask=in_p, other=0.0)
    raw = tl.load(dt + row * dt_r + s).to(tl.float32) + bias_dt
    queries, gates, q_past = (), (), ()
    if KERNEL > 0:
        k_past = past_of(ring, at_k, in_n, position, slots, ring_t, KERNEL=KERNEL)
        v_past = past_of(ring, at_v, in_p, position, slots, ring_t, KERNEL=KERNEL)
    for reader in tl.static_range(READERS):
        head = s * READERS + reader
        queries += (tl.load(q + row * q_r + head * n + i, mask=in_n, other=0.0),)
        if KERNEL > 0:
            q_past += (past_of(ring, head * n + i, in_n, position, slots, ring_t, KERNEL=KERNEL),)
        if HAS_GATE:
            gates += (tl.load(z + row * z_r + head * p + j, mask=in_p, other=0.0),)
    before = tl.load(state + at, mask=inside, other=0.0)
    if KERNEL > 0:
        key = convolved(
            key, k_past, k_taps, ring, at_k, position, slots, ring_t, first, KERNEL=KERNEL, HAS_BIAS=HAS_BIAS
        )
        value = convolved(
            value, v_past, v_taps, ring, at_v, position, slots, ring_t, in_p, KERNEL=KERNEL, HAS_BIAS=HAS_BIAS
        )
    key, value = key.to(tl.float32), value.to(tl.float32)
    grown = tl.exp(tl.minimum(raw, 20.0))
    above = 1.0 + grown
    # log1p, with what 1 + grown has rounded off put back; softplus is cut off at 20, as in torch.
    step = tl.where(above == 1.0, grown, tl.log(above) * (grown / tl.where(above == 1.0, 1.0, above - 1.0)))
    step = tl.where(raw > 20.0, raw, step)
    decay = tl.exp(-step * tl.exp(log_A))
    h = decay * before + key[:, None] * (step * value)[None, :]
    tl.store(state + at, h, mask=inside)
    for reader in tl.static_range(READERS):
        head = s * READERS + reader
        query = queries[reader]
        if KERNEL > 0:
            query = convolved(
                query,
                q_past[reader],
                q_taps[reader],
                ring,
                head * n + i,
                position,
                slots,
                ring_t,
                first,
                KERNEL=KERNEL,
                HAS_BIAS=HAS_BIAS,
            )
        out = tl.sum(query.to(tl.float32)[:, None] * h, axis=0) + skips[reader] * value
        if HAS_GATE:
            gate = gates[reader].to(tl.float32)
            out *= gate / (1.0 + tl.exp(-gate))
        tl.store(y + row * y_r + head * p + j, out.to(y.dtype.element_ty), mask=in_p)
