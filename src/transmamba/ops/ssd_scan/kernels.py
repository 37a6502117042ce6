"""The Triton kernels of ssd_scan and memory_converter. A program carries the state of one head over one segment.

Letters: L tokens of a chunk, N state_size, P head_dim; S the running sum of dt A within the chunk, f_j = dt_j exp(S_L -
S_j) what is left of token j at the chunk's end, e_i = exp(S_i). S and dt lie in (heads, chunks * L), where places
behind a segment's end have dt = 0 and the last S. Derivation: docs/ops/ssd_scan.md.

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
def decay_kernel(
    dt, A, S, steps, segments, dt_b, dt_t, dt_h, A_h, heads, places, L: tl.constexpr, BLOCK_H: tl.constexpr
):
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
    total = tl.cumsum(step * rate[None, :], axis=0)
    out = head.to(tl.int64)[None, :] * places + ((first_chunk + chunk) * L + tl.arange(0, L))[:, None]
    keep = (head < heads)[None, :] & (token >= 0)[:, None]
    tl.store(S + out, total, mask=keep)
    tl.store(steps + out, step, mask=keep)


@triton.jit
def state_kernel(
    x,
    z,
    S,
    steps,
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
    size_n,
    size_p,
    places,
    REVERSE: tl.constexpr,
    ENTERING: tl.constexpr,
    BY_ROW: tl.constexpr,
    STORE_CHUNKS: tl.constexpr,
    STORE_LEFT: tl.constexpr,
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Carry a state over a segment: h <- exp(S_L) h + sum_j f_j x_j z_j^T, or in reverse with e_i in place of f_j.

    Forward, x and z are keys and values; in reverse, queries and the output's gradient.
    ENTERING: start from `entering`, one state per segment, or per row with BY_ROW; zeros otherwise. STORE_CHUNKS: write
    the state that enters each chunk. STORE_LEFT: write the state at the end, and the sum of dt A over the segment.
    """
    index = tl.program_id(0)
    block = index % BLOCKS_P
    head = (index // BLOCKS_P) % heads
    segment = index // (BLOCKS_P * heads)
    batch, start, count, first_chunk, row, _, _ = segment_of(segments, segment)
    n = tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    within = tl.arange(0, L)
    plane = n.to(tl.int64)[:, None] * size_p + p[None, :]
    stored = (n < size_n)[:, None] & (p < size_p)[None, :]
    plane_size = tl.cast(size_n, tl.int64) * size_p
    h = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if ENTERING:
        origin = row if BY_ROW else segment.to(tl.int64)
        h = tl.load(entering + (origin * heads + head) * plane_size + plane, mask=stored, other=0.0).to(tl.float32)
    x += batch * x_b + start * x_t + (head // x_group).to(tl.int64) * x_h
    z += batch * z_b + start * z_t + (head // z_group).to(tl.int64) * z_h
    vector = (head // dt_group).to(tl.int64) * places + first_chunk * L
    chunk_states += (first_chunk * heads + head) * plane_size
    total = 0.0
    chunks = tl.cdiv(count, L)
    for i in range(0, chunks):
        chunk = chunks - 1 - i if REVERSE else i
        rows = chunk * L + within
        inside = rows < count
        x_c = load_tile(x, rows, x_t, n, inside, size_n, WHOLE_N, DOT)
        z_c = load_tile(z, rows, z_t, p, inside, size_p, WHOLE_P, DOT)
        S_c = tl.load(S + vector + rows)
        S_end = tl.load(S + vector + chunk * L + L - 1)
        if REVERSE:
            weight = tl.exp(S_c)
        else:
            weight = tl.load(steps + vector + rows) * tl.exp(S_end - S_c)
        if STORE_CHUNKS:
            place = chunk_states + tl.cast(chunk, tl.int64) * heads * plane_size + plane
            tl.store(place, h.to(chunk_states.dtype.element_ty), mask=stored)
        written = (z_c.to(tl.float32) * weight[:, None]).to(DOT)
        h = tl.dot(tl.trans(x_c), written, acc=h * tl.exp(S_end), input_precision=PRECISION)
        total += S_end
    if STORE_LEFT:
        tl.store(left + (segment.to(tl.int64) * heads + head) * plane_size + plane, h, mask=stored)
        tl.store(log_decay + segment.to(tl.int64) * heads + head, total, mask=block == 0)


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
    STORE_ENTERING: tl.constexpr,
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
        if STORE_ENTERING:
            tl.store(entering + at, h, mask=mask)
        decay = tl.exp(tl.load(log_decay + segment.to(tl.int64) * heads + head))
        h = h * decay + tl.load(left + at, mask=mask, other=0.0)
    if STORE_FINAL:
        tl.store(final + (row.to(tl.int64) * heads + head) * plane_size + place, h, mask=mask)


@triton.jit
def scan_kernel(
    q,
    k,
    v,
    S,
    steps,
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
        S_c = tl.load(S + vector + rows)
        step = tl.load(steps + vector + rows)
        S_end = tl.load(S + vector + chunk * L + L - 1)
        scores = tl.dot(q_c, tl.trans(k_c), input_precision=PRECISION)
        scores *= tl.exp(tl.where(past, S_c[:, None] - S_c[None, :], float("-inf"))) * step[None, :]
        y_c = tl.dot(q_c, h.to(DOT), input_precision=PRECISION) * tl.exp(S_c)[:, None]
        y_c = tl.dot(scores.to(DOT), v_c, acc=y_c, input_precision=PRECISION)
        if SKIP:
            y_c += skip * v_c.to(tl.float32)
        place = y + rows.to(tl.int64)[:, None] * y_t + p[None, :]
        tl.store(place, y_c.to(y.dtype.element_ty), mask=inside[:, None] & (p < size_p)[None, :])
        written = (v_c.to(tl.float32) * (step * tl.exp(S_end - S_c))[:, None]).to(DOT)
        h = tl.dot(tl.trans(k_c), written, acc=h * tl.exp(S_end), input_precision=PRECISION)
    if is_last * (head % state_group == 0) != 0:
        tl.store(final + (row * state_heads + state_head) * plane_size + plane, h, mask=stored)


@triton.jit
def query_gradient_kernel(
    k,
    v,
    q,
    dy,
    S,
    steps,
    entering,
    chunk_states,
    dq,
    carried,
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
    dq_t,
    tokens,
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
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one head's queries over one segment, along with the states, which are computed anew and stored.

    dq (batch, tokens, slots, N) with a slot per head and block of P; carried (slots, places): e_i q_i^T h dy_i, what
    the entering state gave to each token; chunk_states (chunks, state heads, N, P): the state that enters each chunk.
    """
    index = tl.program_id(0)
    block = index % BLOCKS_P
    head = (index // BLOCKS_P) % heads
    segment = index // (BLOCKS_P * heads)
    batch, start, count, first_chunk, row, _, _ = segment_of(segments, segment)
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
    dy += batch * dy_b + start * dy_t + head.to(tl.int64) * dy_h
    slot = (head * BLOCKS_P + block).to(tl.int64)
    dq += (batch * tokens + start) * dq_t + slot * size_n
    carried += slot * places + first_chunk * L
    vector = (head // dt_group).to(tl.int64) * places + first_chunk * L
    chunk_states += (first_chunk * state_heads + state_head) * plane_size
    first_reader = head % state_group == 0
    past = within[:, None] >= within[None, :]
    for chunk in range(0, tl.cdiv(count, L)):
        rows = chunk * L + within
        inside = rows < count
        k_c = load_tile(k, rows, k_t, n, inside, size_n, WHOLE_N, DOT)
        v_c = load_tile(v, rows, v_t, p, inside, size_p, WHOLE_P, DOT)
        dy_c = load_tile(dy, rows, dy_t, p, inside, size_p, WHOLE_P, DOT)
        q_c = load_tile(q, rows, q_t, n, inside, size_n, WHOLE_N, DOT)
        S_c = tl.load(S + vector + rows)
        step = tl.load(steps + vector + rows)
        S_end = tl.load(S + vector + chunk * L + L - 1)
        h_dot = h.to(DOT)
        if first_reader:
            place = chunk_states + tl.cast(chunk, tl.int64) * state_heads * plane_size + plane
            tl.store(place, h.to(chunk_states.dtype.element_ty), mask=stored)
        dscores = tl.dot(dy_c, tl.trans(v_c), input_precision=PRECISION)
        dscores *= tl.exp(tl.where(past, S_c[:, None] - S_c[None, :], float("-inf"))) * step[None, :]
        dq_c = tl.dot(dy_c, tl.trans(h_dot), input_precision=PRECISION) * tl.exp(S_c)[:, None]
        tl.store(carried + rows, tl.sum(dq_c * q_c.to(tl.float32), axis=1))
        dq_c = tl.dot(dscores.to(DOT), k_c, acc=dq_c, input_precision=PRECISION)
        place = dq + rows.to(tl.int64)[:, None] * dq_t + n[None, :]
        tl.store(place, dq_c.to(dq.dtype.element_ty), mask=inside[:, None] & (n < size_n)[None, :])
        written = (v_c.to(tl.float32) * (step * tl.exp(S_end - S_c))[:, None]).to(DOT)
        h = tl.dot(tl.trans(k_c), written, acc=h * tl.exp(S_end), input_precision=PRECISION)


@triton.jit
def key_value_gradient_kernel(
    q,
    k,
    v,
    dy,
    S,
    steps,
    A,
    D,
    chunk_states,
    leaving,
    carried,
    dk,
    dv,
    ddt,
    dA,
    dD,
    dstate,
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
    dk_t,
    dv_t,
    A_h,
    D_h,
    tokens,
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
    LEAVING: tl.constexpr,
    BY_ROW: tl.constexpr,
    SKIP: tl.constexpr,
    STORE_DSTATE: tl.constexpr,
    L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    WHOLE_N: tl.constexpr,
    WHOLE_P: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The other gradients of one head over one segment, from its last chunk to its first; dh is that of the state.

    Every output is a part of its own: dk (batch, tokens, slots, N) with a slot per head and block of P, dv (batch,
    tokens, heads, P), ddt (batch, tokens, slots), dA and dD (segments, slots), dstate (rows, heads, N, P).
    LEAVING: dh starts from `leaving`, one per segment and head; with BY_ROW, one per row and state head, of which the
    first head that reads the state takes the gradient. Without READS there are no queries and outputs, as in
    memory_converter: the gradient comes from the final state alone.
    """
    index = tl.program_id(0)
    block = index % BLOCKS_P
    head = (index // BLOCKS_P) % heads
    segment = index // (BLOCKS_P * heads)
    batch, start, count, first_chunk, row, is_first, _ = segment_of(segments, segment)
    n = tl.arange(0, BLOCK_N)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    within = tl.arange(0, L)
    plane = n.to(tl.int64)[:, None] * size_p + p[None, :]
    stored = (n < size_n)[:, None] & (p < size_p)[None, :]
    plane_size = tl.cast(size_n, tl.int64) * size_p
    state_heads = heads // state_group
    dh = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if LEAVING:
        if BY_ROW:
            origin = leaving + (row * state_heads + head // state_group) * plane_size
            dh = tl.load(origin + plane, mask=stored, other=0.0).to(tl.float32)
            dh = tl.where(head % state_group == 0, dh, 0.0)
        else:
            dh = tl.load(leaving + (segment.to(tl.int64) * heads + head) * plane_size + plane, mask=stored, other=0.0)
    q += batch * q_b + start * q_t + (head // q_group).to(tl.int64) * q_h
    k += batch * k_b + start * k_t + (head // k_group).to(tl.int64) * k_h
    v += batch * v_b + start * v_t + (head // v_group).to(tl.int64) * v_h
    dy += batch * dy_b + start * dy_t + head.to(tl.int64) * dy_h
    token = batch * tokens + start
    slot = (head * BLOCKS_P + block).to(tl.int64)
    dk += token * dk_t + slot * size_n
    dv += token * dv_t + head.to(tl.int64) * size_p
    ddt += token * (heads * BLOCKS_P) + slot
    carried += slot * places + first_chunk * L
    vector = (head // dt_group).to(tl.int64) * places + first_chunk * L
    chunk_states += (first_chunk * state_heads + head // state_group) * plane_size
    rate = tl.load(A + (head // dt_group) * A_h).to(tl.float32)
    skip = 0.0
    if SKIP:
        skip = tl.load(D + head * D_h).to(tl.float32)
    sum_A = 0.0
    sum_D = 0.0
    future = within[:, None] <= within[None, :]  # (j, i): whether token i reads token j
    same = within[:, None] == within[None, :]
    chunks = tl.cdiv(count, L)
    for i in range(0, chunks):
        chunk = chunks - 1 - i
        rows = chunk * L + within
        inside = rows < count
        k_c = load_tile(k, rows, k_t, n, inside, size_n, WHOLE_N, DOT)
        v_c = load_tile(v, rows, v_t, p, inside, size_p, WHOLE_P, DOT)
        h = tl.load(chunk_states + tl.cast(chunk, tl.int64) * state_heads * plane_size + plane, mask=stored, other=0.0)
        S_c = tl.load(S + vector + rows)
        step = tl.load(steps + vector + rows)
        S_end = tl.load(S + vector + chunk * L + L - 1)
        to_end = tl.exp(S_end - S_c)
        dh_dot = dh.to(DOT)
        dk_c = tl.dot(v_c, tl.trans(dh_dot), input_precision=PRECISION) * to_end[:, None]
        kept = tl.sum(dk_c * k_c.to(tl.float32), axis=1)  # by the chunk's end, of token j; per unit of dt_j
        dv_c = tl.dot(k_c, dh_dot, input_precision=PRECISION) * (step * to_end)[:, None]

        # dt_t A decays what passes over token t: pairs j < t <= i, of which i, j or both may lie outside the chunk.
        dh *= tl.exp(S_end)
        over = tl.cumsum(kept * step, axis=0) - kept * step + tl.sum(h.to(tl.float32) * dh)

        if READS:
            q_c = load_tile(q, rows, q_t, n, inside, size_n, WHOLE_N, DOT)
            dy_c = load_tile(dy, rows, dy_t, p, inside, size_p, WHOLE_P, DOT)
            decay_t = tl.exp(tl.where(future, S_c[None, :] - S_c[:, None], float("-inf")))
            dscores_t = tl.dot(v_c, tl.trans(dy_c), input_precision=PRECISION)
            if SKIP:
                sum_D += tl.sum(tl.where(same, dscores_t, 0.0))
            dscores_t *= decay_t
            dk_c = tl.dot(dscores_t.to(DOT), q_c, acc=dk_c, input_precision=PRECISION)
            scores_t = tl.dot(k_c, tl.trans(q_c), input_precision=PRECISION)
            pairs = scores_t * dscores_t
            read = tl.sum(pairs, axis=1)  # by all tokens, of token j; per unit of dt_j
            gained = tl.sum(pairs * step[:, None], axis=0)  # by token i, of all tokens
            dv_c = tl.dot((scores_t * decay_t * step[:, None]).to(DOT), dy_c, acc=dv_c, input_precision=PRECISION)
            if SKIP:
                dv_c += skip * dy_c.to(tl.float32)
            weighted = (dy_c.to(tl.float32) * tl.exp(S_c)[:, None]).to(DOT)
            dh = tl.dot(tl.trans(q_c), weighted, acc=dh, input_precision=PRECISION)
            over += tl.cumsum(gained - read * step + tl.load(carried + rows), axis=0, reverse=True)
            kept += read

        place = dk + rows.to(tl.int64)[:, None] * dk_t + n[None, :]
        tl.store(place, (dk_c * step[:, None]).to(dk.dtype.element_ty), mask=inside[:, None] & (n < size_n)[None, :])
        place = dv + rows.to(tl.int64)[:, None] * dv_t + p[None, :]
        tl.store(place, dv_c.to(dv.dtype.element_ty), mask=inside[:, None] & (p < size_p)[None, :])
        tl.store(ddt + rows.to(tl.int64) * (heads * BLOCKS_P), kept + rate * over, mask=inside)
        sum_A += tl.sum(over * step)
    part = segment.to(tl.int64) * (heads * BLOCKS_P) + slot
    tl.store(dA + part, sum_A)
    if SKIP:
        tl.store(dD + part, sum_D)
    if STORE_DSTATE:
        if is_first != 0:
            tl.store(dstate + (row * heads + head) * plane_size + plane, dh, mask=stored)
