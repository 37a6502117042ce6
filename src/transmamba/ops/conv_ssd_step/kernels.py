"""The Triton kernel of conv_ssd_step: a program takes some columns of one state, and the channels these depend on."""

import triton
import triton.language as tl


@triton.jit
def convolved(
    x,
    ring,
    weight,
    bias,
    channel,
    inside,
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
    total = x.to(tl.float32) * tl.load(weight + channel * KERNEL + (KERNEL - 1), mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(1, KERNEL):
        slot = (position + slots - tap) % slots
        past = tl.load(ring + slot * ring_t + channel, mask=inside, other=0.0).to(tl.float32)
        total += past * tl.load(weight + channel * KERNEL + (KERNEL - 1 - tap), mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
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
):
    """READERS: query heads of a state. KERNEL: taps, 0 without a convolution."""
    place = tl.program_id(0).to(tl.int64)
    row, s = place // state_heads, place % state_heads
    i = tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = i < n, j < p
    group = s * key_heads // state_heads
    widths = state_heads * READERS * n  # channels of q, before those of k
    key = tl.load(k + row * k_r + group * n + i, mask=in_n, other=0.0)
    value = tl.load(v + row * v_r + group * p + j, mask=in_p, other=0.0)
    position = tl.load(positions + row)
    first = i < n * (1 - tl.minimum(tl.program_id(1), 1))  # the first program of a state writes q and k
    if KERNEL > 0:
        ring += row * ring_r
        channel = widths + group * n + i
        key = convolved(
            key, ring, weight, bias, channel, in_n, position, slots, ring_t, first, KERNEL=KERNEL, HAS_BIAS=HAS_BIAS
        )
        channel = widths + key_heads * n + group * p + j
        value = convolved(
            value, ring, weight, bias, channel, in_p, position, slots, ring_t, in_p, KERNEL=KERNEL, HAS_BIAS=HAS_BIAS
        )
    key, value = key.to(tl.float32), value.to(tl.float32)
    raw = tl.load(dt + row * dt_r + s).to(tl.float32) + tl.load(dt_bias + s).to(tl.float32)
    grown = tl.exp(tl.minimum(raw, 20.0))
    above = 1.0 + grown
    # log1p, with what 1 + grown has rounded off put back; softplus is cut off at 20, as in torch.
    step = tl.where(above == 1.0, grown, tl.log(above) * (grown / tl.where(above == 1.0, 1.0, above - 1.0)))
    step = tl.where(raw > 20.0, raw, step)
    decay = tl.exp(-step * tl.exp(tl.load(A_log + s).to(tl.float32)))
    at, inside = (place * n + i[:, None]) * p + j[None, :], in_n[:, None] & in_p[None, :]
    h = decay * tl.load(state + at, mask=inside, other=0.0) + key[:, None] * (step * value)[None, :]
    tl.store(state + at, h, mask=inside)
    for reader in tl.static_range(READERS):
        head = s * READERS + reader
        query = tl.load(q + row * q_r + head * n + i, mask=in_n, other=0.0)
        if KERNEL > 0:
            query = convolved(
                query,
                ring,
                weight,
                bias,
                head * n + i,
                in_n,
                position,
                slots,
                ring_t,
                first,
                KERNEL=KERNEL,
                HAS_BIAS=HAS_BIAS,
            )
        out = tl.sum(query.to(tl.float32)[:, None] * h, axis=0) + tl.load(D + head).to(tl.float32) * value
        if HAS_GATE:
            gate = tl.load(z + row * z_r + head * p + j, mask=in_p, other=0.0).to(tl.float32)
            out *= gate / (1.0 + tl.exp(-gate))
        tl.store(y + row * y_r + head * p + j, out.to(y.dtype.element_ty), mask=in_p)
