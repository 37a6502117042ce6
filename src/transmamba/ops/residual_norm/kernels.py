"""The Triton kernels of residual_norm and post_norm: a program holds some whole rows; backward, several in turn."""

import triton
import triton.language as tl


@triton.jit
def normed_rows(x, size, inside, eps, CENTRED: tl.constexpr):
    """(these rows without their mean, if CENTRED, and of RMS 1; 1 / the RMS)."""
    if CENTRED:
        mean = tl.sum(x, axis=1) / size
        x = tl.where(inside, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / size + eps)
    return x * inverse[:, None], inverse


@triton.jit
def norm_kernel(
    x,
    branch,
    weight,
    bias,
    y,
    rows,
    size,
    x_r,
    branch_r,
    eps,
    CENTRED: tl.constexpr,
    BRANCH: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y (rows, size), dense, of x or, with BRANCH, of x + branch."""
    row, column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    in_c = column < size
    inside = (row < rows)[:, None] & in_c[None, :]
    at = row.to(tl.int64)[:, None]
    given = tl.load(x + at * x_r + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        given += tl.load(branch + at * branch_r + column[None, :], mask=inside, other=0.0).to(tl.float32)
    result, _ = normed_rows(given, size, inside, eps, CENTRED)
    result = result * tl.load(weight + column, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        result += tl.load(bias + column, mask=in_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at * size + column[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    dy,
    x,
    branch,
    weight,
    more,
    dx,
    parts,
    rows,
    size,
    steps,
    dy_r,
    x_r,
    branch_r,
    more_r,
    eps,
    CENTRED: tl.constexpr,
    BRANCH: tl.constexpr,
    BIAS: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx (rows, size), dense, plus `more` with MORE; with BRANCH the gradient of x and of branch. parts (programs, 1 or
    2, size), fp32: each program's part of the gradients of weight and, with BIAS, bias, over its steps of BLOCK_R rows.
    """
    column = tl.arange(0, BLOCK_C)
    in_c = column < size
    w = tl.load(weight + column, mask=in_c, other=0.0).to(tl.float32)
    d_weight, d_bias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for step in range(0, steps):
        row = (tl.program_id(0) * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & in_c[None, :]
        at = row.to(tl.int64)[:, None]
        given = tl.load(x + at * x_r + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if BRANCH:
            given += tl.load(branch + at * branch_r + column[None, :], mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dy + at * dy_r + column[None, :], mask=inside, other=0.0).to(tl.float32)
        normed, inverse = normed_rows(given, size, inside, eps, CENTRED)
        d_weight += tl.sum(gradient * normed, axis=0)
        if BIAS:
            d_bias += tl.sum(gradient, axis=0)
        da = gradient * w[None, :]
        result = da - normed * (tl.sum(da * normed, axis=1) / size)[:, None]
        if CENTRED:
            result -= (tl.sum(da, axis=1) / size)[:, None]
        result = result * inverse[:, None]
        if MORE:
            result += tl.load(more + at * more_r + column[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at * size + column[None, :], result.to(dx.dtype.element_ty), mask=inside)
    count = 2 if BIAS else 1
    to = parts + tl.program_id(0).to(tl.int64) * count * size + column
    tl.store(to, d_weight, mask=in_c)
    if BIAS:
        tl.store(to + size, d_bias, mask=in_c)
