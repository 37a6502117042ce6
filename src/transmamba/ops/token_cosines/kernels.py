"""The Triton kernels of token_cosines: a program holds some rows of x and the tokens they belong to, whole."""

import triton
import triton.language as tl


@triton.jit
def standardised_rows(x, width, inside, eps, least):
    """(the layer norm of these rows, its scale, its length but at least `least`); 0 outside."""
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    a = centred * scale[:, None]
    length = tl.maximum(tl.sqrt(tl.sum(a * a, axis=1)), least)
    return a, scale, length


@triton.jit
def rows_of_both(
    x,
    y,
    places,
    rows,
    per_direction,
    steps,
    width,
    x_m,
    x_b,
    x_t,
    y_b,
    y_t,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(rows, columns, which are inside, x of them, the tokens they belong to), fp32."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    in_r = row < rows
    inside = in_r[:, None] & (column < width)[None, :]
    m = (row // per_direction).to(tl.int64)
    within = row % per_direction
    image, t = (within // steps).to(tl.int64), (within % steps).to(tl.int64)
    place = tl.load(places + m * steps + t, mask=in_r, other=0)
    at = m * x_m + image * x_b + t * x_t
    ours = tl.load(x + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    at = image * y_b + place * y_t
    theirs = tl.load(y + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return row, column, inside, ours, theirs


@triton.jit
def cosine_kernel(
    x,
    y,
    places,
    cosines,
    rows,
    per_direction,
    steps,
    width,
    x_m,
    x_b,
    x_t,
    y_b,
    y_t,
    eps,
    least,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """cosines (rows,), fp32."""
    row, _, inside, ours, theirs = rows_of_both(
        x, y, places, rows, per_direction, steps, width, x_m, x_b, x_t, y_b, y_t, BLOCK_R, BLOCK_C
    )
    a, _, a_length = standardised_rows(ours, width, inside, eps, least)
    b, _, b_length = standardised_rows(theirs, width, inside, eps, least)
    tl.store(cosines + row, tl.sum(a * b, axis=1) / (a_length * b_length), mask=row < rows)


@triton.jit
def cosine_backward_kernel(
    slopes,
    x,
    y,
    places,
    dx,
    rows,
    per_direction,
    steps,
    width,
    x_m,
    x_b,
    x_t,
    y_b,
    y_t,
    eps,
    least,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx (rows, width), dense; slopes (rows,): the cosines' gradients. Cosines are computed again."""
    row, column, inside, ours, theirs = rows_of_both(
        x, y, places, rows, per_direction, steps, width, x_m, x_b, x_t, y_b, y_t, BLOCK_R, BLOCK_C
    )
    a, scale, a_length = standardised_rows(ours, width, inside, eps, least)
    b, _, b_length = standardised_rows(theirs, width, inside, eps, least)
    b = b / b_length[:, None]
    cosine = tl.sum(a * b, axis=1) / a_length
    slope = tl.load(slopes + row, mask=row < rows, other=0.0) * scale / a_length
    result = slope[:, None] * (b - a * (cosine / a_length)[:, None])
    to = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(dx + to, result.to(dx.dtype.element_ty), mask=inside)
