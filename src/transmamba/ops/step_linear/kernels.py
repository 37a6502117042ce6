"""The Triton kernels of step_linear: a program makes some outputs of one weight, for all rows, and reads them once.

For one row there are no matrices to multiply: many small programs, each of which has all its loads under way at once.
"""

import triton
import triton.language as tl


@triton.jit
def part_of(
    block, w0, w1, w2, w3, w4, n0, n1, n2, n3, n4, NUM: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(weight, its outputs, block within it, outputs of the weights before it) of a program."""
    zero = block * 0  # keeps sizes that are compiled in, such as 1, of one type with the others
    first, column, count, w = block, zero, n0 + zero, w0
    if NUM > 1 and not GATED:
        before = tl.cdiv(n0, BLOCK_N)
        if block >= before:
            w, count, first, column = w1, n1 + zero, block - before, n0 + zero
        if NUM > 2:
            before += tl.cdiv(n1, BLOCK_N)
            if block >= before:
                w, count, first, column = w2, n2 + zero, block - before, n0 + n1 + zero
        if NUM > 3:
            before += tl.cdiv(n2, BLOCK_N)
            if block >= before:
                w, count, first, column = w3, n3 + zero, block - before, n0 + n1 + n2 + zero
        if NUM > 4:
            before += tl.cdiv(n3, BLOCK_N)
            if block >= before:
                w, count, first, column = w4, n4 + zero, block - before, n0 + n1 + n2 + n3 + zero
    return w, count, first, column


@triton.jit
def linear_kernel(
    x,
    w0,
    w1,
    w2,
    w3,
    w4,
    norm,
    residual,
    y,
    rows,
    size,
    eps,
    n0,
    n1,
    n2,
    n3,
    n4,
    x_r,
    residual_r,
    y_r,
    NUM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y (rows, outputs of all weights side by side). NUM: weights that are given, (n_i, size) each; GATED: w0 is the
    gate of w1. The norm's scale is applied to the sums, since it is one number a row. WIDE: exact products of fp32.
    """
    w, count, first, column = part_of(
        tl.program_id(0), w0, w1, w2, w3, w4, n0, n1, n2, n3, n4, NUM=NUM, GATED=GATED, BLOCK_N=BLOCK_N
    )
    m, i = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n = first * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m < rows, n < count
    at_w = n.to(tl.int64)[None, :] * size
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    other = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + i
        in_k = k < size
        inside = in_k[:, None] & in_n[None, :]
        given = tl.load(x + m[:, None] * x_r + k[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0)
        weight = tl.load(w + at_w + k[:, None], mask=inside, other=0.0)
        if HAS_NORM:
            exact = given.to(tl.float32)
            squares += tl.sum(exact * exact, axis=1)
            scale = tl.load(norm + k, mask=in_k, other=0.0).to(tl.float32)
            given = (exact * scale[None, :]).to(given.dtype)
        if WIDE:
            total += tl.dot(given.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
        else:
            total = tl.dot(given, weight, total)
        if GATED:
            up = tl.load(w1 + at_w + k[:, None], mask=inside, other=0.0)
            if WIDE:
                other += tl.dot(given.to(tl.float32), up.to(tl.float32), input_precision="ieee")
            else:
                other = tl.dot(given, up, other)
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(squares / size + eps)
        total *= scale[:, None]
        other *= scale[:, None]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * other
    out = in_m[:, None] & in_n[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + m[:, None] * residual_r + n[None, :], mask=out, other=0.0).to(tl.float32)
    tl.store(y + m[:, None] * y_r + (column + n)[None, :], total.to(y.dtype.element_ty), mask=out)


@triton.jit
def row_kernel(
    x,
    w0,
    w1,
    w2,
    w3,
    w4,
    norm,
    residual,
    y,
    size,
    eps,
    n0,
    n1,
    n2,
    n3,
    n4,
    NUM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same for one row, in fp32 throughout."""
    w, count, first, column = part_of(
        tl.program_id(0), w0, w1, w2, w3, w4, n0, n1, n2, n3, n4, NUM=NUM, GATED=GATED, BLOCK_N=BLOCK_N
    )
    n = first * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_K)
    in_n = n < count
    at_w = n.to(tl.int64)[:, None] * size
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + i
        in_k = k < size
        inside = in_n[:, None] & in_k[None, :]
        weight = tl.load(w + at_w + k[None, :], mask=inside, other=0.0).to(tl.float32)
        given = tl.load(x + k, mask=in_k, other=0.0)
        exact = given.to(tl.float32)
        if HAS_NORM:
            squares += exact * exact
            scale = tl.load(norm + k, mask=in_k, other=0.0).to(tl.float32)
            exact = (exact * scale).to(given.dtype).to(tl.float32)
        total += weight * exact[None, :]
        if GATED:
            up = tl.load(w1 + at_w + k[None, :], mask=inside, other=0.0).to(tl.float32)
            other += up * exact[None, :]
    sums = tl.sum(total, axis=1)
    others = tl.sum(other, axis=1)
    if HAS_NORM:
        root = 1.0 / tl.sqrt(tl.sum(squares) / size + eps)
        sums *= root
        others *= root
    if GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * others
    if HAS_RESIDUAL:
        sums += tl.load(residual + n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(y + column + n, sums.to(y.dtype.element_ty), mask=in_n)
