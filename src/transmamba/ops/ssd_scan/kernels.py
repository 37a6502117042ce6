"""The Triton kernels of ssd_scan and memory_converter. A program carries the state of one head over one segment.

Letters: L tokens of a chunk, N state_size, P head_dim; S the running sum of dt A / ln 2 within the chunk, f_j = dt_j
2^(S_L - S_j) what is left of token j at the chunk's end, e_i = 2^S_i. Powers of two, since one instruction computes
them, where one of e takes five. S and dt lie in (heads, chunks * L), where places
behind a segment's end have dt = 0 and the last S; `decays` holds S and after it dt. Derivation: docs/ops/ssd_scan.md.

No kernel transposes what a product has left in registers: Triton 3.4 to 3.7.0 gets that wrong on Hopper
(github.com/fla-org/flash-linear-attention/issues/640). Transposed operands are loaded tiles, or products of their own.
"""

import triton
import triton.language as tl


@triton.jit
def segment_of(segments, index):
    """(batch, start, count, first_chunk, row, is_first, is_last); the order is that of transmamba.ops.segments."""
    line = segments + index.to(tl.int64) * 7
    return (
        tl.load(line).to(tl.int64),
        tl.load(line + 1).to(tl.int64),
        tl.load(line + 2),
        tl.load(line + 3).to(tl.int64),
        tl.load(line + 4).to(tl.int64),
        tl.load(line + 5),
        tl.load(line + 6),
    )


@triton.jit
def load_tile(base, rows, stride, columns, inside, size, WHOLE: tl.constexpr, DOT: tl.constexpr):
    """Rows of a (tokens, size) matrix as a tile; zeros outside."""
    mask = inside[:, None]
    if not WHOLE:
        mask = mask & (columns[None, :] < size)
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def load_rows(base, tile, inside, columns, size, WHOLE: tl.constexpr, DOT: tl.constexpr):
    """A tile whose first entry is at `base`; zeros outside."""
    mask = inside[:, None]
    if not WHOLE:
        mask = mask & (columns[None, :] < size)
    return tl.load(base + tile, mask=mask, other=0.0).to(DOT)


@triton.jit
def load_plane(base, n, p, size_n, size_p, WHOLE_N: tl.constexpr, WHOLE_P: tl.constexpr):
    """A tile of a state; zeros outside."""
    place = base + n.to(tl.int64)[:, None] * size_p + p[None, :]
    if WHOLE_N and WHOLE_P:
        return tl.load(place)
    return tl.load(place, mask=(n < size_n)[:, None] & (p < size_p)[None, :], other=0.0)


@triton.jit
def decay_kernel(dt, A, decays, segments, dt_b, dt_t, dt_h, A_h, heads, places, L: tl.constexpr, BLOCK_H: tl.constexpr):
    """S and dt of one chunk, for BLOCK_H heads."""
    batch, start, count, first_chunk, _, _, _ = segment_of(segments, tl.program_id(0))
    chunk = tl.program_id(1)
    if chunk * L >= count:
        return
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    token = chunk * L + tl.arange(0, L)
    mask = (token < count)[:, None] & (head < heads)[None, :]
    place = dt + batch * dt_b + (start + token)[:, None] * dt_t + head.to(tl.int64)[None, :] * dt_h
    step = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    rate = tl.load(A + head * A_h, mask=head < heads, other=0.0).to(tl.float32)
    total = tl.cumsum(step * (rate * 1.4426950408889634)[None, :], axis=0)
    out = head.to(tl.int64)[None, :] * places + ((first_chunk + chunk) * L + tl.arange(0, L))[:, None]
    keep = (head < heads)[None, :] & (token >= 0)[:, None]
    tl.store(decays + out, total, mask=keep)
    tl.store(decays + tl.cast(heads, tl.int64) * places + out, step, mask=keep)


@triton.jit
def state_kernel(
    x,
    z,
    decays,
    entering,
    chunk_states,
    left,
    log_decay,
    segments,
    x_b,
    x_t,
    x_h,
    z_b,
    z_t,
    z_h,
    heads,
    x_group,
    z_group,
    dt_group,
    outer_group,
    size_n,
    size_p,
    places,
    REVERSE: tl.constexpr,
    ENTERING: tl.constexpr,
    BY_ROW: tl.constexpr,
    STORE_CHUNKS: tl.constexpr,
    STORE_LEFT: tl.constexpr,
    STORE_END: tl.constexpr,
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Carry a state over a segment: h <- 2^S_L h + sum_j f_j x_j z_j^T, or in reverse with e_i in place of f_j.

    Forward, x and z are keys and values; in reverse, queries and the output's gradient.
    ENTERING: start from `entering`, one state per segment and head, or with BY_ROW one per row and group of heads, of
    which only the first takes it; zeros otherwise. STORE_CHUNKS: write the state that enters each chunk. STORE_LEFT:
    write the state at the segment's end, and the segment's sum of dt A / ln 2. STORE_END: write the state at the row's
    end (in reverse, its beginning).
    """
    index = tl.program_id(0)
    block = index % BLOCKS_P
    head = (index // BLOCKS_P) % heads
    segment = index // (BLOCKS_P * heads)
    batch, start, count, first_chunk, row, is_first, is_last = segment_of(segments, segment)
    n = tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    within = tl.arange(0, L)
    plane = n.to(tl.int64)[:, None] * size_p + p[None, :]
    stored = (n < size_n)[:, None] & (p < size_p)[None, :]
    plane_size = tl.cast(size_n, tl.int64) * size_p
    h = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if ENTERING:
        if BY_ROW:
            origin = entering + (row * (heads // outer_group) + head // outer_group) * plane_size
            h = tl.load(origin + plane, mask=stored, other=0.0).to(tl.float32)
            h = tl.where(head % outer_group == 0, h, 0.0)
        else:
            h = tl.load(entering + (segment.to(tl.int64) * heads + head) * plane_size + plane, mask=stored, other=0.0)
    x += batch * x_b + start * x_t + (head // x_group).to(tl.int64) * x_h
    z += batch * z_b + start * z_t + (head // z_group).to(tl.int64) * z_h
    vector = (head // dt_group).to(tl.int64) * places + first_chunk * L
    dt_vector = vector + tl.cast(heads // dt_group, tl.int64) * places
    chunk_states += (first_chunk * heads + head) * plane_size
    total = 0.0
    chunks = tl.cdiv(count, L)
    for i in range(0, chunks):
        chunk = chunks - 1 - i if REVERSE else i
        rows = chunk * L + within
        inside = rows < count
        x_c = load_tile(x, rows, x_t, n, inside, size_n, WHOLE_N, DOT)
        z_c = load_tile(z, rows, z_t, p, inside, size_p, WHOLE_P, DOT)
        S_c = tl.load(decays + vector + rows)
        S_end = tl.load(decays + vector + chunk * L + L - 1)
        if REVERSE:
            weight = tl.exp2(S_c)
        else:
            weight = tl.load(decays + dt_vector + rows) * tl.exp2(S_end - S_c)
        if STORE_CHUNKS:
            place = chunk_states + tl.cast(chunk, tl.int64) * heads * plane_size + plane
            tl.store(place, h.to(chunk_states.dtype.element_ty), mask=stored)
        written = (z_c.to(tl.float32) * weight[:, None]).to(DOT)
        h = tl.dot(tl.trans(x_c), written, acc=h * tl.exp2(S_end), input_precision=PRECISION)
        total += S_end
    if STORE_LEFT:
        tl.store(left + (segment.to(tl.int64) * heads + head) * plane_size + plane, h, mask=stored)
        tl.store(log_decay + segment.to(tl.int64) * heads + head, total, mask=block == 0)
    if STORE_END:
        at_end = is_first if REVERSE else is_last
        if at_end != 0:
            tl.store(left + (row * heads + head) * plane_size + plane, h, mask=stored)


@triton.jit
def recur_kernel(
    left,
    log_decay,
    outer,
    entering,
    final,
    first_of_row,
    heads,
    outer_group,
    plane_size,
    REVERSE: tl.constexpr,
    OUTER: tl.constexpr,
    STORE_FINAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Carry states over the segments of one row, from `outer` (or zeros); write what enters each and what leaves all.

    With outer_group > 1, `outer` has fewer heads, and only the first head of each group starts from it.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    place = tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < plane_size
    first = tl.load(first_of_row + row)
    after = tl.load(first_of_row + row + 1)
    h = tl.zeros((BLOCK,), tl.float32)
    if OUTER:
        origin = outer + (row.to(tl.int64) * (heads // outer_group) + head // outer_group) * plane_size
        h = tl.load(origin + place, mask=mask, other=0.0).to(tl.float32)
        h = tl.where(head % outer_group == 0, h, 0.0)
    for i in range(0, after - first):
        segment = after - 1 - i if REVERSE else first + i
        at = (segment.to(tl.int64) * heads + head) * plane_size + place
        tl.store(entering + at, h, mask=mask)
        decay = tl.exp2(tl.load(log_decay + segment.to(tl.int64) * heads + head))
        h = h * decay + tl.load(left + at, mask=mask, other=0.0)
    if STORE_FINAL:
        tl.store(final + (row.to(tl.int64) * heads + head) * plane_size + place, h, mask=mask)


@triton.jit
def scan_kernel(
    q,
    k,
    v,
    decays,
    D,
    entering,
    y,
    final,
    segments,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    y_b,
    y_t,
    y_h,
    D_h,
    heads,
    q_group,
    k_group,
    v_group,
    dt_group,
    state_group,
    size_n,
    size_p,
    places,
    ENTERING: tl.constexpr,
    BY_ROW: tl.constexpr,
    SKIP: tl.constexpr,
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of one head over one segment, and the row's final state where the segment is its last.

    ENTERING: start from `entering`, one state per segment, or per row with BY_ROW.
    """
    index = tl.program_id(0)
    block = index % BLOCKS_P
    head = (index // BLOCKS_P) % heads
    segment = index // (BLOCKS_P * heads)
    batch, start, count, first_chunk, row, _, is_last = segment_of(segments, segment)
    n = tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    within = tl.arange(0, L)
    plane = n.to(tl.int64)[:, None] * size_p + p[None, :]
    stored = (n < size_n)[:, None] & (p < size_p)[None, :]
    plane_size = tl.cast(size_n, tl.int64) * size_p
    state_head = head // state_group
    state_heads = heads // state_group
    h = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if ENTERING:
        origin = row if BY_ROW else segment.to(tl.int64)
        h = tl.load(entering + (origin * state_heads + state_head) * plane_size + plane, mask=stored, other=0.0)
        h = h.to(tl.float32)
    q += batch * q_b + start * q_t + (head // q_group).to(tl.int64) * q_h
    k += batch * k_b + start * k_t + (head // k_group).to(tl.int64) * k_h
    v += batch * v_b + start * v_t + (head // v_group).to(tl.int64) * v_h
    y += batch * y_b + start * y_t + head.to(tl.int64) * y_h
    vector = (head // dt_group).to(tl.int64) * places + first_chunk * L
    dt_vector = vector + tl.cast(heads // dt_group, tl.int64) * places
    past = within[:, None] >= within[None, :]
    skip = 0.0
    if SKIP:
        skip = tl.load(D + head * D_h).to(tl.float32)
    for chunk in range(0, tl.cdiv(count, L)):
        rows = chunk * L + within
        inside = rows < count
        q_c = load_tile(q, rows, q_t, n, inside, size_n, WHOLE_N, DOT)
        k_c = load_tile(k, rows, k_t, n, inside, size_n, WHOLE_N, DOT)
        v_c = load_tile(v, rows, v_t, p, inside, size_p, WHOLE_P, DOT)
        S_c = tl.load(decays + vector + rows)
        step = tl.load(decays + dt_vector + rows)
        S_end = tl.load(decays + vector + chunk * L + L - 1)
        scores = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
        scores *= tl.exp2(tl.where(past, S_c[:, None] - S_c[None, :], float("-inf"))) * step[None, :]
        y_c = tl.dot(q_c, h.to(DOT), input_precision=PRECISION) * tl.exp2(S_c)[:, None]
        y_c = tl.dot(scores.to(DOT), v_c, acc=y_c, input_precision=PRECISION)
        if SKIP:
            y_c += skip * v_c.to(tl.float32)
        place = y + rows.to(tl.int64)[:, None] * y_t + p[None, :]
        tl.store(place, y_c.to(y.dtype.element_ty), mask=inside[:, None] & (p < size_p)[None, :])
        written = (v_c.to(tl.float32) * (step * tl.exp2(S_end - S_c))[:, None]).to(DOT)
        h = tl.dot(tl.trans(k_c), written, acc=h * tl.exp2(S_end), input_precision=PRECISION)
    if is_last * (head % state_group == 0) != 0:
        tl.store(final + (row * state_heads + state_head) * plane_size + plane, h, mask=stored)


@triton.jit
def rest_kernel(decays, out, segments, first_of_row, places, L: tl.constexpr, WHOLE_ROWS: tl.constexpr):
    """Sums of dt A / ln 2 from chunks' ends to rows', (dt_heads, chunks); WHOLE_ROWS: over rows, (rows, dt_heads)."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(first_of_row + row)
    after = tl.load(first_of_row + row + 1)
    total = 0.0
    for i in range(0, after - first):
        _, _, count, first_chunk, _, _, _ = segment_of(segments, after - 1 - i)
        chunks = tl.cdiv(count, L)
        for j in range(0, chunks):
            chunk = first_chunk + chunks - 1 - j
            if not WHOLE_ROWS:
                tl.store(out + head * (places // L) + chunk, total)
            total += tl.load(decays + head * places + chunk * L + L - 1)
    if WHOLE_ROWS:
        tl.store(out + row.to(tl.int64) * tl.num_programs(1) + head, total)


@triton.jit
def gradient_kernel(
    q,
    k,
    v,
    dy,
    decays,
    A,
    D,
    states,
    dstates,
    rest,
    dq,
    dk,
    dv,
    ddt,
    dA,
    segments,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    dy_b,
    dy_t,
    dy_h,
    dq_b,
    dk_b,
    dv_b,
    ddt_b,
    A_h,
    D_h,
    longest,
    heads,
    q_group,
    k_group,
    v_group,
    dt_group,
    state_group,
    size_n,
    size_p,
    places,
    READS: tl.constexpr,
    SKIP: tl.constexpr,
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one head's q, k, v, dt, A and D in one chunk, from the states around it.

    states (chunks, state heads, N, P): h, which enters each chunk. dstates (chunks, heads, N, P): dh, the gradient of
    the state that leaves it. dq, dk, dv (batch, tokens, heads, size) and ddt (batch, tokens, heads): a part per head.
    dA (chunks, heads), and behind it, with SKIP, D's gradient. Without READS there are no queries and outputs, as in
    memory_converter: dstates (rows, heads, N, P) is the gradient of the final state, which decays over the `rest` of
    the row.
    """
    index = tl.program_id(0)
    head = index % heads
    chunk = (index // heads) % longest
    batch, start, count, first_chunk, row, _, _ = segment_of(segments, index // (heads * longest))
    if chunk * L >= count:
        return
    within = tl.arange(0, L)
    inside = chunk * L + within < count
    columns_n = tl.arange(0, BLOCK_N)
    columns_p = tl.arange(0, BLOCK_P)
    plane_size = tl.cast(size_n, tl.int64) * size_p
    state_head = head // state_group
    place = first_chunk + chunk
    first = start + chunk * L
    q += batch * q_b + first * q_t + (head // q_group).to(tl.int64) * q_h
    k += batch * k_b + first * k_t + (head // k_group).to(tl.int64) * k_h
    v += batch * v_b + first * v_t + (head // v_group).to(tl.int64) * v_h
    dy += batch * dy_b + first * dy_t + head.to(tl.int64) * dy_h
    token = first * heads + head
    dq += batch * dq_b + token * size_n
    dk += batch * dk_b + token * size_n
    dv += batch * dv_b + token * size_p
    ddt += batch * ddt_b + token
    h_base = states + (place * (heads // state_group) + state_head) * plane_size
    vector = (head // dt_group).to(tl.int64) * places + place * L
    dt_vector = vector + tl.cast(heads // dt_group, tl.int64) * places
    S_c = tl.load(decays + vector + within)
    step = tl.load(decays + dt_vector + within)
    S_end = tl.load(decays + vector + L - 1)
    from_start = tl.exp2(S_c)
    if READS:
        dh_base = dstates + (place * heads + head) * plane_size
        remaining = 1.0
        to_end = tl.exp2(S_end - S_c)
    else:
        dh_base = dstates + (row * heads + head) * plane_size
        remaining = tl.exp2(tl.load(rest + (head // dt_group).to(tl.int64) * (places // L) + place))
        to_end = tl.exp2(S_end - S_c) * remaining
    read = tl.zeros((L,), tl.float32)
    over = tl.zeros((L,), tl.float32)

    if READS:
        scores = tl.zeros((L, L), tl.float32)  # (j, i): what token i reads of token j, per unit of dt_j
        for a in range(0, BLOCKS_N):
            n = a * BLOCK_N + columns_n
            q_n = load_tile(q, within, q_t, n, inside, size_n, WHOLE_N, DOT)
            k_n = load_tile(k, within, k_t, n, inside, size_n, WHOLE_N, DOT)
            scores = tl.dot(k_n, tl.trans(q_n), acc=scores, input_precision=PRECISION)
        dscores = tl.zeros((L, L), tl.float32)  # (j, i)
        dscores_i = tl.zeros((L, L), tl.float32)  # (i, j)
        for b in range(0, BLOCKS_P):
            p = b * BLOCK_P + columns_p
            v_p = load_tile(v, within, v_t, p, inside, size_p, WHOLE_P, DOT)
            dy_p = load_tile(dy, within, dy_t, p, inside, size_p, WHOLE_P, DOT)
            dscores = tl.dot(v_p, tl.trans(dy_p), acc=dscores, input_precision=PRECISION)
            dscores_i = tl.dot(dy_p, tl.trans(v_p), acc=dscores_i, input_precision=PRECISION)
        if SKIP:
            diagonal = tl.where(within[:, None] == within[None, :], dscores, 0.0)
            tl.store(dA + (places // L + place) * heads + head, tl.sum(diagonal))
        future = within[:, None] <= within[None, :]
        decay = tl.exp2(tl.where(future, S_c[None, :] - S_c[:, None], float("-inf")))
        dscores *= decay
        pairs = scores * dscores
        read = tl.sum(pairs, axis=1)  # by all tokens, of token j; per unit of dt_j
        gained = tl.sum(pairs * step[:, None], axis=0)  # by token i, of all tokens
        scores_dot = (scores * decay * step[:, None]).to(DOT)
        dscores_dot = dscores.to(DOT)
        past = within[:, None] >= within[None, :]
        decay_i = tl.exp2(tl.where(past, S_c[:, None] - S_c[None, :], float("-inf")))
        dscores_i_dot = (dscores_i * decay_i * step[None, :]).to(DOT)
        over += tl.cumsum(gained - read * step, axis=0, reverse=True)

    for b in range(0, BLOCKS_P):
        p = b * BLOCK_P + columns_p
        dv_p = tl.zeros((L, BLOCK_P), tl.float32)
        for a in range(0, BLOCKS_N):
            n = a * BLOCK_N + columns_n
            k_n = load_tile(k, within, k_t, n, inside, size_n, WHOLE_N, DOT)
            dh = load_plane(dh_base, n, p, size_n, size_p, WHOLE_N, WHOLE_P)
            dv_p = tl.dot(k_n, dh.to(DOT), acc=dv_p, input_precision=PRECISION)
        dv_p *= (step * to_end)[:, None]
        if READS:
            dy_p = load_tile(dy, within, dy_t, p, inside, size_p, WHOLE_P, DOT)
            dv_p = tl.dot(scores_dot, dy_p, acc=dv_p, input_precision=PRECISION)
            if SKIP:
                dv_p += tl.load(D + head * D_h).to(tl.float32) * dy_p.to(tl.float32)
        out = dv + within.to(tl.int64)[:, None] * (heads * size_p) + p[None, :]
        tl.store(out, dv_p.to(dv.dtype.element_ty), mask=inside[:, None] & (p < size_p)[None, :])

    kept = tl.zeros((L,), tl.float32)  # by the chunk's end, of token j; per unit of dt_j
    carried = tl.zeros((L,), tl.float32)  # by token i, of the state that enters
    passing = 0.0  # from the state that enters to the one that leaves
    for a in range(0, BLOCKS_N):
        n = a * BLOCK_N + columns_n
        dk_n = tl.zeros((L, BLOCK_N), tl.float32)
        dq_n = tl.zeros((L, BLOCK_N), tl.float32)
        for b in range(0, BLOCKS_P):
            p = b * BLOCK_P + columns_p
            v_p = load_tile(v, within, v_t, p, inside, size_p, WHOLE_P, DOT)
            dh = load_plane(dh_base, n, p, size_n, size_p, WHOLE_N, WHOLE_P)
            h = load_plane(h_base, n, p, size_n, size_p, WHOLE_N, WHOLE_P)
            passing += tl.sum(h.to(tl.float32) * dh.to(tl.float32))
            dk_n = tl.dot(v_p, tl.trans(dh.to(DOT)), acc=dk_n, input_precision=PRECISION)
            if READS:
                dy_p = load_tile(dy, within, dy_t, p, inside, size_p, WHOLE_P, DOT)
                dq_n = tl.dot(dy_p, tl.trans(h.to(DOT)), acc=dq_n, input_precision=PRECISION)
        k_n = load_tile(k, within, k_t, n, inside, size_n, WHOLE_N, DOT)
        dk_n *= to_end[:, None]
        kept += tl.sum(dk_n * k_n.to(tl.float32), axis=1)
        mask = inside[:, None] & (n < size_n)[None, :]
        out = within.to(tl.int64)[:, None] * (heads * size_n) + n[None, :]
        if READS:
            q_n = load_tile(q, within, q_t, n, inside, size_n, WHOLE_N, DOT)
            dk_n = tl.dot(dscores_dot, q_n, acc=dk_n, input_precision=PRECISION)
            dq_n *= from_start[:, None]
            carried += tl.sum(dq_n * q_n.to(tl.float32), axis=1)
            dq_n = tl.dot(dscores_i_dot, k_n, acc=dq_n, input_precision=PRECISION)
            tl.store(dq + out, dq_n.to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + out, (dk_n * step[:, None]).to(dk.dtype.element_ty), mask=mask)

    # dt_t A decays what passes over token t: pairs j < t <= i, of which i, j or both may lie outside the chunk.
    over += tl.cumsum(kept * step, axis=0) - kept * step + passing * tl.exp2(S_end) * remaining
    if READS:
        over += tl.cumsum(carried, axis=0, reverse=True)
    rate = tl.load(A + (head // dt_group) * A_h).to(tl.float32)
    tl.store(ddt + within.to(tl.int64) * heads, read + kept + rate * over, mask=inside)
    tl.store(dA + place * heads + head, tl.sum(over * step))


@triton.jit
def sweep_kernel(
    q,
    k,
    v,
    other,
    decays,
    D,
    entering,
    y,
    end,
    sums,
    states,
    flows,
    diagonals,
    segments,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    other_b,
    other_t,
    other_h,
    y_b,
    y_t,
    y_h,
    D_h,
    heads,
    q_group,
    k_group,
    v_group,
    other_group,
    dt_group,
    entering_group,
    end_group,
    size_n,
    size_p,
    places,
    REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ENTERING: tl.constexpr,
    BY_ROW: tl.constexpr,
    SKIP: tl.constexpr,
    SUMS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    STORE_STATES: tl.constexpr,
    FLOWS: tl.constexpr,
    STORE_END: tl.constexpr,
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One pass over a segment with a state h, which q reads and which k and v write: y, or a gradient in its place.

    y: q, k, v. dq: dy, v, k. dv: k, q, dy in reverse. dk: v, dy, q in reverse. Forward, row i reads row j <= i with
    weight 2^(S_i - S_j) dt_j; in reverse, row j reads rows i >= j with that weight.
    TRANSPOSED: `entering` and `end` hold the state's transpose. ENTERING: start from `entering`, one state per segment,
    or per row with BY_ROW; in reverse only the first of the heads that share it takes it. SKIP: y += D v.
    SUMS: y's product with `other`, row by row, over this block's columns, (blocks, heads, places), with what comes from
    within the chunk not rounded. In reverse per unit of dt, and apart, (2, ...): from within the chunk, and from h.
    DIAGONAL: the sum of q_i . k_i over the segment, (segments, heads).
    STORE_STATES: write the state that enters each chunk, (chunks, heads, N, P). FLOWS: read those, and write their
    product with the state at the chunk's other end, (blocks, chunks, heads).
    STORE_END: write the state at the row's end (in reverse, its beginning), one for every end_group heads.
    """
    index = tl.program_id(0)
    block = index % BLOCKS_P
    head = (index // BLOCKS_P) % heads
    segment = index // (BLOCKS_P * heads)
    batch, start, count, first_chunk, row, is_first, is_last = segment_of(segments, segment)
    n = tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    within = tl.arange(0, L)
    plane = n[:, None] * size_p + p[None, :]
    outer_plane = n[:, None] + p[None, :] * size_n if TRANSPOSED else plane
    stored = (n < size_n)[:, None] & (p < size_p)[None, :]
    plane_size = tl.cast(size_n, tl.int64) * size_p
    h = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if ENTERING:
        origin = row if BY_ROW else segment.to(tl.int64)
        origin = origin * (heads // entering_group) + head // entering_group
        h = tl.load(entering + origin * plane_size + outer_plane, mask=stored, other=0.0).to(tl.float32)
        if REVERSE:
            h = tl.where(head % entering_group == 0, h, 0.0)
    q += batch * q_b + start * q_t + (head // q_group).to(tl.int64) * q_h
    k += batch * k_b + start * k_t + (head // k_group).to(tl.int64) * k_h
    v += batch * v_b + start * v_t + (head // v_group).to(tl.int64) * v_h
    y += batch * y_b + start * y_t + head.to(tl.int64) * y_h
    # Offsets within a tile fit 32 bits, and stay the same: a chunk moves scalars alone.
    q_tile = within[:, None] * q_t + n[None, :]
    k_tile = within[:, None] * k_t + n[None, :]
    v_tile = within[:, None] * v_t + p[None, :]
    y_tile = within[:, None] * y_t + p[None, :]
    if SUMS:
        other += batch * other_b + start * other_t + (head // other_group).to(tl.int64) * other_h
        other_tile = within[:, None] * other_t + p[None, :]
        sums += (block * heads + head).to(tl.int64) * places + first_chunk * L
        from_state = sums + tl.cast(BLOCKS_P * heads, tl.int64) * places
    decays += (head // dt_group).to(tl.int64) * places + first_chunk * L
    steps = decays + tl.cast(heads // dt_group, tl.int64) * places
    if STORE_STATES or FLOWS:
        states += (first_chunk * heads + head) * plane_size
    if FLOWS:
        flows += (tl.cast(block, tl.int64) * (places // L) + first_chunk) * heads + head
    skip = 0.0
    if SKIP:
        skip = tl.load(D + head * D_h).to(tl.float32)
    if REVERSE:
        reads = within[:, None] <= within[None, :]
    else:
        reads = within[:, None] >= within[None, :]
    diagonal = tl.zeros((L,), tl.float32)
    chunks = tl.cdiv(count, L)
    for i in range(0, chunks):
        chunk = chunks - 1 - i if REVERSE else i
        token = tl.cast(chunk, tl.int64) * L
        inside = within < count - chunk * L
        # Every load before the first product, behind whose barriers it would wait by itself.
        q_c = load_rows(q + token * q_t, q_tile, inside, n, size_n, WHOLE_N, DOT)
        k_c = load_rows(k + token * k_t, k_tile, inside, n, size_n, WHOLE_N, DOT)
        v_c = load_rows(v + token * v_t, v_tile, inside, p, size_p, WHOLE_P, DOT)
        S_c = tl.load(decays + token + within)
        step = tl.load(steps + token + within)
        S_end = tl.load(decays + token + L - 1)
        if SUMS:
            other_c = load_rows(other + token * other_t, other_tile, inside, p, size_p, WHOLE_P, DOT)
        if FLOWS:
            at = tl.cast(chunk, tl.int64) * heads
            entered = tl.load(states + at * plane_size + plane, mask=stored, other=0.0)
            tl.store(flows + at, tl.sum(entered.to(tl.float32) * h))
        scores = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
        if DIAGONAL:
            diagonal += tl.sum(tl.where(within[:, None] == within[None, :], scores, 0.0), axis=1)
        if REVERSE:
            scores *= tl.exp2(tl.where(reads, S_c[None, :] - S_c[:, None], float("-inf")))
            weight = tl.exp2(S_end - S_c)
            written = (v_c.to(tl.float32) * tl.exp2(S_c)[:, None]).to(DOT)
        else:
            scores *= tl.exp2(tl.where(reads, S_c[:, None] - S_c[None, :], float("-inf"))) * step[None, :]
            weight = tl.exp2(S_c)
            written = (v_c.to(tl.float32) * (step * tl.exp2(S_end - S_c))[:, None]).to(DOT)
        if SUMS:
            pairs = tl.dot(other_c, tl.trans(v_c), input_precision=PRECISION) * scores
            products = tl.sum(pairs, axis=1)
            if REVERSE:
                tl.store(sums + token + within, products)
        h_dot = h.to(DOT)
        if STORE_STATES:
            place = states + tl.cast(chunk, tl.int64) * heads * plane_size + plane
            tl.store(place, h.to(states.dtype.element_ty), mask=stored)
        y_c = tl.dot(q_c, h_dot, input_precision=PRECISION) * weight[:, None]
        if SUMS:
            outer_products = tl.sum(y_c * other_c.to(tl.float32), axis=1)
            if REVERSE:
                tl.store(from_state + token + within, outer_products)
            else:
                tl.store(sums + token + within, products + outer_products)
        y_c = tl.dot(scores.to(DOT), v_c, acc=y_c, input_precision=PRECISION)
        if REVERSE:
            y_c *= step[:, None]
        if SKIP:
            y_c += skip * v_c.to(tl.float32)
        mask = inside[:, None] if WHOLE_P else inside[:, None] & (p < size_p)[None, :]
        tl.store(y + token * y_t + y_tile, y_c.to(y.dtype.element_ty), mask=mask)
        h = tl.dot(tl.trans(k_c), written, acc=h * tl.exp2(S_end), input_precision=PRECISION)
    if DIAGONAL:
        tl.store(diagonals + segment.to(tl.int64) * heads + head, tl.sum(diagonal), mask=block == 0)
    if STORE_END:
        at_end = is_first if REVERSE else is_last
        if at_end * (head % end_group == 0) != 0:
            origin = row * (heads // end_group) + head // end_group
            tl.store(end + origin * plane_size + outer_plane, h, mask=stored)


@triton.jit
def step_gradient_kernel(
    reads,
    writes,
    flows,
    decays,
    A,
    ddt,
    dA,
    segments,
    ddt_b,
    A_h,
    heads,
    dt_group,
    places,
    L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Gradients of dt, (batch, tokens, heads), and of A, (chunks, heads), for BLOCK_H heads of one chunk.

    reads (blocks, heads, places): q_i . dq_i. writes (2, blocks, heads, places): k_j . dk_j per unit of dt_j, from
    within the chunk and from dh. flows (blocks, chunks, heads): <h, dh>, what enters and the gradient of what leaves.
    """
    batch, start, count, first_chunk, _, _, _ = segment_of(segments, tl.program_id(0))
    chunk = tl.program_id(1)
    if chunk * L >= count:
        return
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    some = head < heads
    within = tl.arange(0, L)
    inside = (chunk * L + within < count)[:, None] & some[None, :]
    place = first_chunk + chunk
    vector = head.to(tl.int64)[None, :] * places + (place * L + within)[:, None]
    gained = tl.zeros((L, BLOCK_H), tl.float32)  # by token i, of all tokens and of the state that enters
    read = tl.zeros((L, BLOCK_H), tl.float32)  # by all tokens, of token j; per unit of dt_j
    kept = tl.zeros((L, BLOCK_H), tl.float32)  # by the chunk's end, of token j; per unit of dt_j
    flow = tl.zeros((BLOCK_H,), tl.float32)
    whole = tl.cast(heads, tl.int64) * places
    for b in range(0, BLOCKS):
        gained += tl.load(reads + b * whole + vector, mask=inside, other=0.0)
        read += tl.load(writes + b * whole + vector, mask=inside, other=0.0)
        kept += tl.load(writes + (BLOCKS + b) * whole + vector, mask=inside, other=0.0)
        flow += tl.load(flows + (b * (places // L) + place) * heads + head, mask=some, other=0.0)
    dt_head = (head // dt_group).to(tl.int64)
    vectors = decays + dt_head[None, :] * places
    S_end = tl.load(decays + dt_head * places + place * L + L - 1, mask=some, other=0.0)
    vectors += tl.cast(heads // dt_group, tl.int64) * places
    step = tl.load(vectors + (place * L + within)[:, None], mask=inside, other=0.0)
    rate = tl.load(A + dt_head * A_h, mask=some, other=0.0).to(tl.float32)
    # The four parts of what passes over token t, as in gradient_kernel.
    over = tl.cumsum(gained - read * step, axis=0, reverse=True)
    over += tl.cumsum(kept * step, axis=0) - kept * step + (flow * tl.exp2(S_end))[None, :]
    out = ddt + batch * ddt_b + (start + chunk * L + within)[:, None] * heads + head[None, :]
    tl.store(out, (read + kept + rate[None, :] * over).to(ddt.dtype.element_ty), mask=inside)
    tl.store(dA + place * heads + head, tl.sum(over * step, axis=0), mask=some)
