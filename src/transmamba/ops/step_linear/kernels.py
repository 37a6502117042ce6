"""The Triton kernels of step_linear: a program makes some outputs of one weight, for all rows, and reads them once.

For one row there are no matrices to multiply: many small programs, each of which has all its loads under way at once.
CHAINED: a kernel that may begin before those ahead are done, see ops/chain.
"""

import triton
import triton.language as tl

from transmamba.ops.chain.kernels import prefetch, wait_for_the_chain


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
def prefetch_rest(w, first, count, start: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask for a program's outputs of a weight from word `start` on, a piece each."""
    for row in tl.static_range(BLOCK_N):
        n = first * BLOCK_N + row
        at = w + n.to(tl.int64) * WORDS + start
        prefetch(at, tl.where(n < count, (WORDS - start) * 4, 0))


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
    CHAINED: tl.constexpr,
):
    """The same for one row, in fp32 throughout."""
    w, count, first, column = part_of(
        tl.program_id(0), w0, w1, w2, w3, w4, n0, n1, n2, n3, n4, NUM=NUM, GATED=GATED, BLOCK_N=BLOCK_N
    )
    if CHAINED:
        wait_for_the_chain()
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


@triton.jit
def early_row_kernel(
    x,
    w0,
    w1,
    w2,
    w3,
    w4,
    norm,
    residual,
    y,
    eps,
    n0,
    n1,
    n2,
    n3,
    n4,
    WORDS: tl.constexpr,
    NUM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """The same for one row of 16-bit values, with the first HELD * BLOCK_K words of each weight in registers before it
    looks at x. x, norm and weights come as words of 32 bits, two values each, WORDS a row: values would be taken apart
    where they are loaded, which waits for them, and take twice the registers.
    """
    COUNT: tl.constexpr = (WORDS + BLOCK_K - 1) // BLOCK_K
    w, count, first, column = part_of(
        tl.program_id(0), w0, w1, w2, w3, w4, n0, n1, n2, n3, n4, NUM=NUM, GATED=GATED, BLOCK_N=BLOCK_N
    )
    n = first * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < count
    at_w = n.to(tl.int64)[:, None] * WORDS
    tiles, ups, scales, inputs = (), (), (), ()
    for part in tl.static_range(HELD):
        tiles += (tile(w + at_w, in_n, part * BLOCK_K, WORDS=WORDS, BLOCK_K=BLOCK_K),)
        if GATED:
            ups += (tile(w1 + at_w, in_n, part * BLOCK_K, WORDS=WORDS, BLOCK_K=BLOCK_K),)
    if HAS_NORM:
        for part in tl.static_range(COUNT):
            scales += (strip(norm, part * BLOCK_K, WORDS=WORDS, BLOCK_K=BLOCK_K),)
    if CHAINED:
        if HELD < COUNT and WORDS % 4 == 0:  # rows of whole 16 bytes, as a prefetch wants them
            prefetch_rest(w, first, count, HELD * BLOCK_K, WORDS=WORDS, BLOCK_N=BLOCK_N)
            if GATED:
                prefetch_rest(w1, first, count, HELD * BLOCK_K, WORDS=WORDS, BLOCK_N=BLOCK_N)
        wait_for_the_chain()
    for part in tl.static_range(COUNT):
        inputs += (strip(x, part * BLOCK_K, WORDS=WORDS, BLOCK_K=BLOCK_K),)
    if HAS_RESIDUAL:
        added = tl.load(residual + n, mask=in_n, other=0.0).to(tl.float32)
    dtype: tl.constexpr = y.dtype.element_ty
    total = tl.zeros((BLOCK_N, BLOCK_K // 4), tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_K // 4), tl.float32)
    squares = tl.zeros((BLOCK_K // 4,), tl.float32)
    for part in tl.static_range(COUNT):
        if part + HELD < COUNT:
            tiles += (tile(w + at_w, in_n, (part + HELD) * BLOCK_K, WORDS=WORDS, BLOCK_K=BLOCK_K),)
            if GATED:
                ups += (tile(w1 + at_w, in_n, (part + HELD) * BLOCK_K, WORDS=WORDS, BLOCK_K=BLOCK_K),)
        low, high = first_of(inputs[part], dtype), second_of(inputs[part], dtype)
        if HAS_NORM:
            squares += tl.sum(tl.reshape(low * low + high * high, (BLOCK_K // 4, 4)), axis=1)
            low = (low * first_of(scales[part], dtype)).to(dtype).to(tl.float32)
            high = (high * second_of(scales[part], dtype)).to(dtype).to(tl.float32)
        total += sums_of_fours(tiles[part], low, high, dtype, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)
        if GATED:
            other += sums_of_fours(ups[part], low, high, dtype, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)
    sums = tl.sum(total, axis=1)
    others = tl.sum(other, axis=1)
    if HAS_NORM:
        root = 1.0 / tl.sqrt(tl.sum(squares) / (2 * WORDS) + eps)
        sums *= root
        others *= root
    if GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * others
    if HAS_RESIDUAL:
        sums += added
    tl.store(y + column + n, sums.to(dtype), mask=in_n)


@triton.jit
def tile(rows, in_n, start: tl.constexpr, WORDS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Words `start` to start + BLOCK_K of some outputs; 0 beyond the end."""
    k = start + tl.arange(0, BLOCK_K)
    inside = in_n[:, None]
    if start + BLOCK_K > WORDS:
        inside = inside & (k < WORDS)[None, :]
    return tl.load(rows + k[None, :], mask=inside, other=0)


@triton.jit
def strip(x, start: tl.constexpr, WORDS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same of a vector."""
    k = start + tl.arange(0, BLOCK_K)
    if start + BLOCK_K > WORDS:
        words = tl.load(x + k, mask=k < WORDS, other=0)
    else:
        words = tl.load(x + k)
    return words


@triton.jit
def first_of(word, dtype: tl.constexpr):
    """The value at the lower address of each word, in fp32."""
    if dtype == tl.bfloat16:
        value = (word << 16).to(tl.float32, bitcast=True)
    else:
        value = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return value


@triton.jit
def second_of(word, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        value = (word & -65536).to(tl.float32, bitcast=True)
    else:
        value = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return value


@triton.jit
def sums_of_fours(words, low, high, dtype: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Products summed over every four words, which one thread has, (BLOCK_N, BLOCK_K // 4)."""
    products = first_of(words, dtype) * low[None, :] + second_of(words, dtype) * high[None, :]
    return tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_K // 4, 4)), axis=2)
