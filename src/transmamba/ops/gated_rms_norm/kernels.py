"""The Triton kernels of gated_rms_norm: a program takes some tokens, and of them some columns for the gate alone, all
columns for the norm. Tokens before `start` pass.
"""

import triton
import triton.language as tl


@triton.jit
def load_block(x, t, column, x_t, mask):
    """Tokens t and these columns of a row, fp32; 0 outside of the mask."""
    return tl.load(x + t.to(tl.int64)[:, None] * x_t + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x,
    gate,
    weight,
    y,
    inverse,
    tokens,
    size,
    start,
    blocks,
    x_b,
    x_t,
    gate_b,
    gate_t,
    eps,
    NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y (batch, tokens, size). With NORM: inverse (batch, tokens), fp32, 1 / sqrt(mean + eps) of each row."""
    block = tl.program_id(0).to(tl.int64)
    row = block // blocks
    t = (block % blocks).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = column < size
    inside = (t < tokens)[:, None] & in_c[None, :]
    after = (t >= start)[:, None]
    given = load_block(x + row * x_b, t, column, x_t, inside)
    z = load_block(gate + row * gate_b, t - start, column, gate_t, inside & after)
    result = given * z / (1.0 + tl.exp(-z))
    if NORM:
        r = 1.0 / tl.sqrt(tl.sum(result * result, axis=1) / size + eps)
        tl.store(inverse + row * tokens + t, r, mask=t < tokens)
        w = tl.load(weight + column, mask=in_c, other=0.0).to(tl.float32)
        result = result * r[:, None] * w[None, :]
    result = tl.where(after, result, given)
    place = (row * tokens + t[:, None]) * size + column[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dy,
    x,
    gate,
    weight,
    inverse,
    dx,
    dgate,
    dweight,
    tokens,
    size,
    start,
    blocks,
    steps,
    dy_b,
    dy_t,
    x_b,
    x_t,
    gate_b,
    gate_t,
    NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx (batch, tokens, size), dgate (batch, tokens - start, size). With NORM: dweight (programs, size), fp32, each
    program's part of the weight's gradient, over its steps of BLOCK_T tokens each.
    """
    block = tl.program_id(0).to(tl.int64)
    row = block // blocks
    first = (block % blocks).to(tl.int32) * steps * BLOCK_T
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = column < size
    w = tl.load(weight + column, mask=in_c, other=0.0).to(tl.float32) if NORM else 0.0
    total = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(0, steps):
        t = first + step * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < tokens)[:, None] & in_c[None, :]
        after = (t >= start)[:, None]
        gradient = load_block(dy + row * dy_b, t, column, dy_t, inside)
        given = load_block(x + row * x_b, t, column, x_t, inside & after)
        z = load_block(gate + row * gate_b, t - start, column, gate_t, inside & after)
        open = 1.0 / (1.0 + tl.exp(-z))
        da = gradient
        if NORM:
            r = tl.load(inverse + row * tokens + t, mask=t < tokens, other=0.0)[:, None]
            normed = given * z * open * r
            total += tl.sum(tl.where(after, gradient * normed, 0.0), axis=0)
            da = gradient * w[None, :]
            da = r * (da - normed * (tl.sum(da * normed, axis=1) / size)[:, None])
        d_given = tl.where(after, da * z * open, gradient)
        d_gate = da * given * open * (1.0 + z * (1.0 - open))
        place = (row * tokens + t[:, None]) * size + column[None, :]
        tl.store(dx + place, d_given.to(dx.dtype.element_ty), mask=inside)
        place = (row * (tokens - start) + t[:, None] - start) * size + column[None, :]
        tl.store(dgate + place, d_gate.to(dgate.dtype.element_ty), mask=inside & after)
    if NORM:
        tl.store(dweight + block * size + column, total, mask=in_c)
