"""The Triton kernels of causal_conv1d: a program takes some tokens of some channels. Where a token's document begins is
read from a table, for packed rows; otherwise it is the row's first token.
"""

import triton
import triton.language as tl


@triton.jit
def tap_of(
    x,
    state,
    t,
    start,
    document,
    channel,
    inside,
    tap,
    x_t,
    state_r,
    state_t,
    KERNEL: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """The input `tap` tokens before t, (tokens, channels): of the document, of its state before, or 0."""
    at = t - tap
    is_token = at >= start
    value = tl.load(x + at.to(tl.int64)[:, None] * x_t + channel[None, :], mask=inside & is_token[:, None], other=0.0)
    value = value.to(tl.float32)
    if HAS_STATE:
        place = KERNEL - 1 + at - start
        past = tl.load(
            state + document.to(tl.int64)[:, None] * state_r + place[:, None] * state_t + channel[None, :],
            mask=inside & (at < start)[:, None],
            other=0.0,
        )
        value += past.to(tl.float32)
    return value


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    state,
    starts,
    documents,
    y,
    tokens,
    channels,
    x_b,
    x_t,
    y_b,
    y_t,
    state_r,
    state_t,
    KERNEL: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y (batch, tokens, channels)."""
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_t, in_c = t < tokens, channel < channels
    inside = in_t[:, None] & in_c[None, :]
    x += row * x_b
    start, document = t * 0, t * 0 + row.to(tl.int32)
    if PACKED:
        start = tl.load(starts + t, mask=in_t, other=0)
        document = tl.load(documents + t, mask=in_t, other=0)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for tap in tl.static_range(0, KERNEL):
        w = tl.load(weight + channel * KERNEL + (KERNEL - 1 - tap), mask=in_c, other=0.0).to(tl.float32)
        given = tap_of(
            x,
            state,
            t,
            start,
            document,
            channel,
            inside,
            tap,
            x_t,
            state_r,
            state_t,
            KERNEL=KERNEL,
            HAS_STATE=HAS_STATE,
        )
        total += given * w[None, :]
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(
        y + row * y_b + t.to(tl.int64)[:, None] * y_t + channel[None, :], total.to(y.dtype.element_ty), mask=inside
    )


@triton.jit
def slope_kernel(
    dy,
    x,
    weight,
    bias,
    state,
    starts,
    documents,
    slope,
    dweight,
    tokens,
    channels,
    dy_b,
    dy_t,
    x_b,
    x_t,
    state_r,
    state_t,
    blocks,
    KERNEL: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """slope (batch, tokens, channels), fp32: the gradient before SiLU, whose value is computed again. dweight (batch
    times blocks of tokens, kernel + 1, channels), fp32: each program's part of the gradient of the taps, and last of
    the bias.
    """
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_t, in_c = t < tokens, channel < channels
    inside = in_t[:, None] & in_c[None, :]
    x += row * x_b
    start, document = t * 0, t * 0 + row.to(tl.int32)
    if PACKED:
        start = tl.load(starts + t, mask=in_t, other=0)
        document = tl.load(documents + t, mask=in_t, other=0)
    given = tl.load(dy + row * dy_b + t.to(tl.int64)[:, None] * dy_t + channel[None, :], mask=inside, other=0.0)
    gradient = given.to(tl.float32)
    if SILU:
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for tap in tl.static_range(0, KERNEL):
            w = tl.load(weight + channel * KERNEL + (KERNEL - 1 - tap), mask=in_c, other=0.0).to(tl.float32)
            value = tap_of(
                x,
                state,
                t,
                start,
                document,
                channel,
                inside,
                tap,
                x_t,
                state_r,
                state_t,
                KERNEL=KERNEL,
                HAS_STATE=HAS_STATE,
            )
            total += value * w[None, :]
        if HAS_BIAS:
            total += tl.load(bias + channel, mask=in_c, other=0.0).to(tl.float32)[None, :]
        open = 1.0 / (1.0 + tl.exp(-total))
        gradient *= open * (1.0 + total * (1.0 - open))
    tl.store(slope + (row * tokens + t[:, None]) * channels + channel[None, :], gradient, mask=inside)
    part = (row * blocks + tl.program_id(0)) * (KERNEL + 1) * channels
    for tap in tl.static_range(0, KERNEL):
        value = tap_of(
            x,
            state,
            t,
            start,
            document,
            channel,
            inside,
            tap,
            x_t,
            state_r,
            state_t,
            KERNEL=KERNEL,
            HAS_STATE=HAS_STATE,
        )
        tl.store(dweight + part + (KERNEL - 1 - tap) * channels + channel, tl.sum(gradient * value, axis=0), mask=in_c)
    tl.store(dweight + part + KERNEL * channels + channel, tl.sum(gradient, axis=0), mask=in_c)


@triton.jit
def input_kernel(
    slope,
    weight,
    starts,
    dx,
    tokens,
    channels,
    KERNEL: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx (batch, tokens, channels): what each input's later outputs in its document ask of it."""
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_t, in_c = t < tokens, channel < channels
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for tap in tl.static_range(0, KERNEL):
        at = t + tap
        same = at < tokens
        if PACKED:
            same = same & (tl.load(starts + at, mask=same, other=tokens) <= t)
        w = tl.load(weight + channel * KERNEL + (KERNEL - 1 - tap), mask=in_c, other=0.0).to(tl.float32)
        given = tl.load(
            slope + (row * tokens + at[:, None]) * channels + channel[None, :],
            mask=same[:, None] & in_c[None, :],
            other=0.0,
        )
        total += given * w[None, :]
    place = (row * tokens + t[:, None]) * channels + channel[None, :]
    tl.store(dx + place, total.to(dx.dtype.element_ty), mask=in_t[:, None] & in_c[None, :])
