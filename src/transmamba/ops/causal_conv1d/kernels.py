"""The Triton kernels of causal_conv1d: a program takes segments of STEPS tokens of some channels and goes along all of
them at once, with the last inputs in registers, so that each is read once. Where a token's document begins is read from
a table, for packed rows; otherwise it is the row's first token. Blocks are (segments, channels), fp32.
"""

import triton
import triton.language as tl


@triton.jit
def block_at(x, at, channel, tokens, channels, x_t):
    """These tokens of a row; 0 outside of it."""
    mask = ((at >= 0) & (at < tokens))[:, None] & (channel < channels)[None, :]
    return tl.load(x + at.to(tl.int64)[:, None] * x_t + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def past_at(state, document, place, mask, channel, channels, state_r, state_t):
    """These places of documents' states, from 0 for the oldest; 0 outside of the mask."""
    at = state + document.to(tl.int64)[:, None] * state_r + place[:, None] * state_t + channel[None, :]
    return tl.load(at, mask=mask[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)


@triton.jit
def before_segments(
    x,
    state,
    row,
    first,
    channel,
    tokens,
    channels,
    x_t,
    state_r,
    state_t,
    KERNEL: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The kernel - 1 inputs before each segment, the latest first; before the row they are its state, or 0."""
    inputs = ()
    for back in tl.static_range(1, KERNEL):
        at = first - back
        value = block_at(x, at, channel, tokens, channels, x_t)
        if HAS_STATE and not PACKED:
            place = KERNEL - 1 + at
            mask = (at < 0) & (place >= 0)
            value += past_at(state, at * 0 + row, place, mask, channel, channels, state_r, state_t)
        inputs = inputs + (value,)
    return inputs


@triton.jit
def read_by(
    inputs,
    state,
    starts,
    documents,
    t,
    channel,
    tokens,
    channels,
    state_r,
    state_t,
    KERNEL: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What tokens t read of a row's last inputs: their own documents' only, and before those the documents' states."""
    read = inputs
    if PACKED:
        start = tl.load(starts + t, mask=t < tokens, other=0)
        read = (inputs[0],)
        for tap in tl.static_range(1, KERNEL):
            at = t - tap
            value = tl.where((at >= start)[:, None], inputs[tap], 0.0)
            if HAS_STATE:
                document = tl.load(documents + t, mask=t < tokens, other=0)
                mask = (at < start) & (t < tokens)
                place = KERNEL - 1 + at - start
                value += past_at(state, document, place, mask, channel, channels, state_r, state_t)
            read = read + (value,)
    return read


@triton.jit
def weights_of(weight, bias, channel, channels, KERNEL: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What meets the input of each tap, counted from the token backward, (1, channels); and the bias, or 0."""
    taps = ()
    for tap in tl.static_range(0, KERNEL):
        at = weight + channel * KERNEL + (KERNEL - 1 - tap)
        taps = taps + (tl.load(at, mask=channel < channels, other=0.0).to(tl.float32)[None, :],)
    offset = (channel * 0.0)[None, :]
    if HAS_BIAS:
        offset = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    return taps, offset


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
    state_r,
    state_t,
    KERNEL: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y (batch, tokens, channels)."""
    row = tl.program_id(2).to(tl.int64)
    first = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)) * STEPS
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x += row * x_b
    y += row * tokens * channels
    taps, offset = weights_of(weight, bias, channel, channels, KERNEL, HAS_BIAS)
    inputs = before_segments(
        x, state, row, first, channel, tokens, channels, x_t, state_r, state_t, KERNEL, HAS_STATE, PACKED
    )
    for step in tl.static_range(0, STEPS):
        t = first + step
        inputs = (block_at(x, t, channel, tokens, channels, x_t),) + inputs[: KERNEL - 1]
        read = read_by(
            inputs,
            state,
            starts,
            documents,
            t,
            channel,
            tokens,
            channels,
            state_r,
            state_t,
            KERNEL,
            HAS_STATE,
            PACKED,
        )
        total = offset + read[0] * taps[0]
        for tap in tl.static_range(1, KERNEL):
            total += read[tap] * taps[tap]
        if SILU:
            total = total / (1.0 + tl.exp(-total))
        mask = (t < tokens)[:, None] & (channel < channels)[None, :]
        place = t.to(tl.int64)[:, None] * channels + channel[None, :]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy,
    x,
    weight,
    bias,
    state,
    starts,
    documents,
    dx,
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
    STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx (batch, tokens, channels). dweight (batch times blocks of segments, kernel + 1, channels), fp32: each
    program's part of the gradient of the taps, and last of the bias.

    Inputs get theirs from later outputs, so the slopes (the gradients before SiLU, whose value is computed again) of
    the kernel - 1 tokens behind a segment, which another one owns, are taken too.
    """
    row = tl.program_id(2).to(tl.int64)
    first = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)) * STEPS
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x += row * x_b
    dy += row * dy_b
    dx += row * tokens * channels
    taps, offset = weights_of(weight, bias, channel, channels, KERNEL, HAS_BIAS)
    inputs = before_segments(
        x, state, row, first, channel, tokens, channels, x_t, state_r, state_t, KERNEL, HAS_STATE, PACKED
    )
    nothing = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    sums = ()
    for _ in tl.static_range(0, KERNEL + 1):
        sums = sums + (nothing,)
    slopes, begins = (), ()  # of the last kernel tokens, the latest first
    for step in tl.static_range(0, STEPS + KERNEL - 1):
        t = first + step
        inputs = (block_at(x, t, channel, tokens, channels, x_t),) + inputs[: KERNEL - 1]
        read = read_by(
            inputs,
            state,
            starts,
            documents,
            t,
            channel,
            tokens,
            channels,
            state_r,
            state_t,
            KERNEL,
            HAS_STATE,
            PACKED,
        )
        slope = block_at(dy, t, channel, tokens, channels, dy_t)
        if SILU:
            total = offset + read[0] * taps[0]
            for tap in tl.static_range(1, KERNEL):
                total += read[tap] * taps[tap]
            open = 1.0 / (1.0 + tl.exp(-total))
            slope *= open * (1.0 + total * (1.0 - open))
        if step < STEPS:
            added = ()
            for tap in tl.static_range(0, KERNEL):
                added = added + (sums[tap] + slope * read[tap],)
            sums = added + (sums[KERNEL] + slope,)
        slopes = (slope,) + slopes[: KERNEL - 1]
        if PACKED:
            begins = (tl.load(starts + t, mask=t < tokens, other=tokens),) + begins[: KERNEL - 1]
        if step >= KERNEL - 1:
            target = t - (KERNEL - 1)
            gradient = nothing
            for tap in tl.static_range(0, KERNEL):
                later = slopes[KERNEL - 1 - tap]
                if PACKED:
                    later = tl.where((begins[KERNEL - 1 - tap] <= target)[:, None], later, 0.0)
                gradient += later * taps[tap]
            mask = (target < tokens)[:, None] & (channel < channels)[None, :]
            place = target.to(tl.int64)[:, None] * channels + channel[None, :]
            tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=mask)
    part = dweight + (row * blocks + tl.program_id(0)) * (KERNEL + 1) * channels + channel
    for tap in tl.static_range(0, KERNEL):
        tl.store(part + (KERNEL - 1 - tap) * channels, tl.sum(sums[tap], axis=0), mask=channel < channels)
    tl.store(part + KERNEL * channels, tl.sum(sums[KERNEL], axis=0), mask=channel < channels)
