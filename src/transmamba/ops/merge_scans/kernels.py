"""The Triton kernels of merge_scans: a program takes some patches of the batch and some columns, and of these all
directions, whose rows lie apart but are whole lines of memory each.
"""

import triton
import triton.language as tl


@triton.jit
def block_of_rows(rows, width, patches, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(rows, their image and patch, columns, which are inside) of this program."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    return row, (row // patches).to(tl.int64), row % patches, column, inside


@triton.jit
def place_of(places, m, patch, patches, inside, ORDERED: tl.constexpr):
    """The steps at which a direction visits these patches; without ORDERED the patches themselves."""
    place = patch.to(tl.int64)
    if ORDERED:
        place = tl.load(places + m * patches + patch, mask=inside, other=0).to(tl.int64)
    return place


@triton.jit
def merge_kernel(
    y,
    places,
    gate,
    out,
    merged,
    rows,
    patches,
    width,
    y_m,
    y_b,
    y_p,
    gate_b,
    gate_p,
    COUNT: tl.constexpr,
    ORDERED: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out (rows, width), dense. With GATE: merged (rows, width), the sum before the gate."""
    row, image, patch, column, inside = block_of_rows(rows, width, patches, BLOCK_R, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in tl.static_range(COUNT):
        place = place_of(places, m, patch, patches, row < rows, ORDERED)
        at = m * tl.cast(y_m, tl.int64) + image * y_b + place * y_p
        total += tl.load(y + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    to = row.to(tl.int64)[:, None] * width + column[None, :]
    if GATE:
        tl.store(merged + to, total.to(merged.dtype.element_ty), mask=inside)
        at = image * gate_b + patch.to(tl.int64) * gate_p
        z = tl.load(gate + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total = total * z / (1.0 + tl.exp(-z))
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def spread_kernel(
    x,
    places,
    gate,
    merged,
    more,
    out,
    dgate,
    rows,
    patches,
    width,
    x_b,
    x_p,
    gate_b,
    gate_p,
    more_m,
    more_b,
    more_p,
    COUNT: tl.constexpr,
    ORDERED: tl.constexpr,
    GATE: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out (directions, rows, width), dense: x, times silu(gate) with GATE, plus `more` of the same place with MORE.

    With GATE: dgate (rows, width), the gate's gradient where x is that of the gated sum.
    """
    row, image, patch, column, inside = block_of_rows(rows, width, patches, BLOCK_R, BLOCK_C)
    at = image * x_b + patch.to(tl.int64) * x_p
    value = tl.load(x + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATE:
        at = image * gate_b + patch.to(tl.int64) * gate_p
        z = tl.load(gate + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        to = row.to(tl.int64)[:, None] * width + column[None, :]
        total = tl.load(merged + to, mask=inside, other=0.0).to(tl.float32)
        open = 1.0 / (1.0 + tl.exp(-z))
        d_gate = value * total * open * (1.0 + z * (1.0 - open))
        tl.store(dgate + to, d_gate.to(dgate.dtype.element_ty), mask=inside)
        value = value * z * open
    for m in tl.static_range(COUNT):
        place = place_of(places, m, patch, patches, row < rows, ORDERED)
        result = value
        if MORE:
            at = m * tl.cast(more_m, tl.int64) + image * more_b + place * more_p
            result += tl.load(more + at[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        to = m * tl.cast(rows, tl.int64) + image * patches + place
        tl.store(out + to[:, None] * width + column[None, :], result.to(out.dtype.element_ty), mask=inside)
