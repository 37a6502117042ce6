"""The Triton kernels of attention_step: keys in parts, so that few rows fill a card too, then the parts together."""

import triton
import triton.language as tl


@triton.jit
def attend_kernel(
    q,
    keys,
    values,
    lengths,
    parts,
    peaks,
    sums,
    q_r,
    q_h,
    k_r,
    k_t,
    k_h,
    v_r,
    v_t,
    v_h,
    key_heads,
    num_parts,
    part_size,
    n,
    p,
    scale,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One part of one key head's tokens, for the GROUP query heads that read it: parts (rows, heads, num_parts, p) not
    yet divided, peaks and sums (rows, heads, num_parts). A part behind the row's length has the peak -inf.

    WIDE: products of fp32 operands, exact.
    """
    row = (tl.program_id(0) // key_heads).to(tl.int64)
    head = (tl.program_id(0) % key_heads).to(tl.int64)
    part = tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    g, t = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_T)
    i, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    in_g, in_n, in_p = g < GROUP, i < n, j < p
    query = tl.load(
        q + row * q_r + (head * GROUP + g[:, None]) * q_h + i[None, :], mask=in_g[:, None] & in_n[None, :], other=0.0
    )
    keys += row * k_r + head * k_h
    values += row * v_r + head * v_h
    peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    if WIDE:
        query = query.to(tl.float32)
    start = part * part_size
    end = tl.minimum(start + part_size, length)
    for first in range(start, end, BLOCK_T):
        at = first + t
        inside = at < end
        where = at.to(tl.int64)
        k = tl.load(keys + where[None, :] * k_t + i[:, None], mask=in_n[:, None] & inside[None, :], other=0.0)
        v = tl.load(values + where[:, None] * v_t + j[None, :], mask=inside[:, None] & in_p[None, :], other=0.0)
        if WIDE:
            scores = tl.dot(query, k.to(tl.float32), input_precision="ieee") * scale
        else:
            scores = tl.dot(query, k) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        shrink = tl.exp(peak - higher)
        weight = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        if WIDE:
            out = out * shrink[:, None] + tl.dot(weight, v.to(tl.float32), input_precision="ieee")
        else:
            out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
        peak = higher
    place = (row * key_heads * GROUP + head * GROUP + g) * num_parts + part
    tl.store(peaks + place, peak, mask=in_g)
    tl.store(sums + place, total, mask=in_g)
    tl.store(parts + place[:, None] * p + j[None, :], out, mask=in_g[:, None] & in_p[None, :])


@triton.jit
def combine_kernel(parts, peaks, sums, y, num_parts, p, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr):
    """The parts of one row and head together: y (rows, heads, p)."""
    place = tl.program_id(0).to(tl.int64)
    s, j = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_P)
    in_s, in_p = s < num_parts, j < p
    peak = tl.load(peaks + place * num_parts + s, mask=in_s, other=float("-inf"))
    total = tl.load(sums + place * num_parts + s, mask=in_s, other=0.0)
    weight = tl.exp(peak - tl.max(peak, axis=0))
    part = tl.load(
        parts + (place * num_parts + s[:, None]) * p + j[None, :], mask=in_s[:, None] & in_p[None, :], other=0.0
    )
    out = tl.sum(part * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(y + place * p + j, out.to(y.dtype.element_ty), mask=in_p)
