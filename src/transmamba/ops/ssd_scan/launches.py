"""ssd_scan and memory_converter on a GPU: programs that carry a state over a segment of the sequence in registers.

Forward reads q, k and v once and writes y once. Where rows are cut into segments, to fill the card, a pass over keys
and values comes first, which learns the state that each segment starts from. Backward computes the state that enters
each chunk anew, stores it, and walks through the chunks from the last to the first. Nothing is added atomically: heads
that share an entry write parts of their own, which are summed in fp32 afterwards, so results are the same bits every
time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from transmamba.ops.segments import Segments

from . import kernels

INTERPRETED = not isinstance(kernels.scan_kernel, triton.JITFunction)  # whose products know no bf16
BLOCK_H = 8  # heads per program of the decay kernel
RECUR_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one kernel runs: columns of the head dim per program, warps, and stages of the loads' pipeline."""

    block_p: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is chosen per shape. programs: how many a launch should have before rows stay whole."""

    chunk: int
    programs: int
    states: Launch
    forward: Launch
    queries: Launch  # backward, their gradient
    backward: Launch  # the other gradients

    def __post_init__(self) -> None:
        assert self.queries.block_p == self.backward.block_p, "each block of columns goes on with its own parts"


def tuning_of(state_size: int, head_dim: int, dtype: torch.dtype) -> Tuning:
    """Return the configuration for these sizes; a table, not a search, so the first call is like every other."""
    n, p = _block(state_size), _block(head_dim)
    if dtype != torch.bfloat16:  # operands of 32 bits
        launch = Launch(block_p=min(p, 32 if n > 64 else 64), warps=4, stages=1)
        return Tuning(chunk=32, programs=256, states=launch, forward=launch, queries=launch, backward=launch)
    if n <= 64:
        p = min(p, 64)
        launch = Launch(block_p=p, warps=4, stages=1)
        forward = Launch(block_p=p, warps=4, stages=3)
        return Tuning(chunk=64, programs=256, states=forward, forward=forward, queries=launch, backward=launch)
    if n <= 128:
        p = min(p, 128)
        launch = Launch(block_p=p, warps=8, stages=1)
        forward = Launch(block_p=min(p, 64), warps=4, stages=1)
        return Tuning(chunk=64, programs=256, states=launch, forward=forward, queries=launch, backward=launch)
    launch = Launch(block_p=min(p, 64), warps=8, stages=1)
    return Tuning(chunk=64, programs=256, states=launch, forward=launch, queries=launch, backward=launch)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Everything about one call but its tensors: head counts, sizes, segments, and how to launch."""

    batch: int
    tokens: int
    heads: int
    state_heads: int
    q_heads: int
    k_heads: int
    v_heads: int
    dt_heads: int
    n: int
    p: int
    dtype: torch.dtype
    tuning: Tuning
    segments: Segments
    borders: tuple[int, ...] | None

    @staticmethod
    def of(
        q_heads: int,
        k: Tensor,
        v: Tensor,
        dt: Tensor,
        borders: Sequence[int] | None,
        tuning: Tuning | None = None,
    ) -> "_Job":
        batch, tokens, k_heads, n = (int(size) for size in k.shape)
        v_heads, p, dt_heads = int(v.shape[2]), int(v.shape[3]), int(dt.shape[2])
        state_heads = max(k_heads, v_heads, dt_heads)
        heads = max(q_heads, state_heads)
        tuning = tuning or tuning_of(n, p, k.dtype)
        rows = None if borders is None else tuple(borders)
        chunks = batch * -(-tokens // tuning.chunk)
        blocks = -(-p // tuning.forward.block_p)
        # Fewer programs than asked for means longer segments; so it is for packed rows, however their borders lie.
        per_segment = max(4, -(-chunks * heads * blocks // tuning.programs))
        segments = Segments.of(batch, tokens, rows, tuning.chunk, per_segment)
        return _Job(
            batch=batch,
            tokens=tokens,
            heads=heads,
            state_heads=state_heads,
            q_heads=q_heads,
            k_heads=k_heads,
            v_heads=v_heads,
            dt_heads=dt_heads,
            n=n,
            p=p,
            dtype=k.dtype,
            tuning=tuning,
            segments=segments,
            borders=rows,
        )

    @property
    def places(self) -> int:
        return self.segments.num_chunks * self.tuning.chunk

    def constants(self, launch: Launch) -> dict[str, object]:
        """The compile-time arguments that all kernels with a state share, and how they are launched."""
        block_n, block_p = _block(self.n), launch.block_p
        # tf32 holds all bits of fp16 and has the range of fp32; three products of it are as good as fp32.
        precision = {torch.bfloat16: "ieee", torch.float16: "tf32"}.get(self.dtype, "tf32x3")
        return {
            "L": self.tuning.chunk,
            "BLOCK_N": block_n,
            "BLOCK_P": block_p,
            "BLOCKS_P": self.blocks(launch),
            "WHOLE_N": block_n == self.n,
            "WHOLE_P": self.p % block_p == 0,
            "DOT": tl.bfloat16 if self.dtype == torch.bfloat16 and not INTERPRETED else tl.float32,
            "PRECISION": precision,
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }

    def blocks(self, launch: Launch) -> int:
        return -(-self.p // launch.block_p)

    def empty_rows(self) -> bool:
        first = self.segments.first_of_row
        return any(a == b for a, b in pairwise(first))


def run_converter(
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
    tuning: Tuning | None = None,
) -> Tensor:
    """The state after each row; see memory_converter."""
    job = _Job.of(1, k, v, dt, borders, tuning)
    k, v = _readable(k), _readable(v)
    if not len(job.segments):
        return _resting_state(job, initial_state, k.device)
    total, step = _decays(job, dt, A)
    _, left, log_decay = _carry(job, k, v, total, step, None, heads=job.state_heads)
    return _recur(job, left, log_decay, initial_state, job.state_heads, final=True)[1]


def run_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    before: Tensor | None,
    borders: Sequence[int] | None,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, the states that segments start from, empty where rows are whole); y begins with `before`."""
    job = _Job.of(int(q.shape[2]), k, v, dt, borders, tuning)
    offset = 0 if before is None else before.shape[1]
    y = v.new_empty(job.batch, offset + job.tokens, job.heads, job.p)
    if before is not None:
        y[:, :offset] = before
    if not len(job.segments):
        return y, _resting_state(job, initial_state, k.device), _empty(k.device)
    q, k, v = _readable(q), _readable(k), _readable(v)
    total, step = _decays(job, dt, A)
    whole = job.segments.whole_rows
    entering = initial_state
    if not whole:
        _, left, log_decay = _carry(job, k, v, total, step, None, heads=job.state_heads)
        entering, _ = _recur(job, left, log_decay, initial_state, job.state_heads)
    final = _new_states(job, initial_state, k.device)
    launch = job.tuning.forward
    out = y[:, offset:]
    table, _ = job.segments.on(k.device)
    kernels.scan_kernel[(len(job.segments) * job.heads * job.blocks(launch),)](
        q,
        k,
        v,
        total,
        step,
        v if D is None else D,
        v if entering is None else entering.contiguous(),
        out,
        final,
        table,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        0 if D is None else D.stride(0),
        job.heads,
        job.heads // job.q_heads,
        job.heads // job.k_heads,
        job.heads // job.v_heads,
        job.heads // job.dt_heads,
        job.heads // job.state_heads,
        job.n,
        job.p,
        job.places,
        ENTERING=entering is not None,
        BY_ROW=whole,
        SKIP=D is not None,
        **job.constants(launch),
    )
    return y, final, _empty(k.device) if whole or entering is None else entering


def shapes_of_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    initial_state: Tensor | None,
    before: Tensor | None,
    borders: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of the shapes that run_scan returns."""
    job = _Job.of(int(q.shape[2]), k, v, dt, borders)
    offset = 0 if before is None else before.shape[1]
    y = v.new_empty(k.shape[0], offset + k.shape[1], job.heads, job.p)
    plane = (job.state_heads, job.n, job.p)
    final = k.new_empty(job.segments.num_rows, *plane, dtype=torch.float32)
    shape = (0,) if job.segments.whole_rows else (len(job.segments), *plane)
    return y, final, k.new_empty(shape, dtype=torch.float32)


def run_scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    entering: Tensor,
    borders: Sequence[int] | None,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, dt, A, D and the initial state; the last two are empty where there is no such input."""
    job = _Job.of(int(q.shape[2]), k, v, dt, borders, tuning)
    q, k, v, dy = _readable(q), _readable(k), _readable(v), _readable(dy)
    total, step = _decays(job, dt, A)
    whole = job.segments.whole_rows
    dq, carried, chunk_states = _query_gradients(job, q, k, v, dy, total, step, initial_state if whole else entering)
    leaving = dfinal
    if not whole:
        _, left, log_decay = _carry(job, q, dy, total, step, None, heads=job.heads, reverse=True)
        leaving, _ = _recur(job, left, log_decay, dfinal, job.heads, job.heads // job.state_heads, reverse=True)
    return dq, *_backward(
        job, (q, dy, carried), k, v, dt, A, D, total, step, chunk_states, leaving, dfinal, initial_state
    )


def run_converter_backward(
    dfinal: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, dt, A and the initial state; the last is empty where there is no such input."""
    job = _Job.of(1, k, v, dt, borders, tuning)
    k, v = _readable(k), _readable(v)
    total, step = _decays(job, dt, A)
    entering, leaving = initial_state, dfinal
    if not job.segments.whole_rows:
        _, left, log_decay = _carry(job, k, v, total, step, None, heads=job.state_heads)
        entering, _ = _recur(job, left, log_decay, initial_state, job.state_heads)
        leaving, _ = _recur(job, left.zero_(), log_decay, dfinal, job.state_heads, reverse=True)
    chunk_states, _, _ = _carry(job, k, v, total, step, entering, heads=job.state_heads, chunks=True)
    dk, dv, ddt, dA, _, dstate = _backward(
        job, None, k, v, dt, A, None, total, step, chunk_states, leaving, dfinal, initial_state
    )
    return dk, dv, ddt, dA, dstate


def _query_gradients(
    job: _Job,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    total: Tensor,
    step: Tensor,
    entering: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run query_gradient_kernel: (dq, what the entering states gave to each token, the states that enter chunks)."""
    launch = job.tuning.queries
    slots = job.heads * job.blocks(launch)
    dtype = torch.bfloat16 if job.dtype == torch.bfloat16 else torch.float32
    chunk_states = torch.empty(job.segments.num_chunks, job.state_heads, job.n, job.p, dtype=dtype, device=k.device)
    carried = torch.empty(slots, job.places, dtype=torch.float32, device=k.device)
    dq = q.new_empty(job.batch, job.tokens, slots, job.n)
    table, _ = job.segments.on(k.device)
    if len(job.segments):
        kernels.query_gradient_kernel[(len(job.segments) * slots,)](
            k,
            v,
            q,
            dy,
            total,
            step,
            total if entering is None else entering.contiguous(),
            chunk_states,
            dq,
            carried,
            table,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *dy.stride()[:3],
            dq.stride(1),
            job.tokens,
            job.heads,
            job.heads // job.q_heads,
            job.heads // job.k_heads,
            job.heads // job.v_heads,
            job.heads // job.dt_heads,
            job.heads // job.state_heads,
            job.n,
            job.p,
            job.places,
            ENTERING=entering is not None,
            BY_ROW=job.segments.whole_rows,
            **job.constants(launch),
        )
    return _sum_parts(dq, job.q_heads, 2), carried, chunk_states


def _backward(
    job: _Job,
    reads: tuple[Tensor, Tensor, Tensor] | None,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    total: Tensor,
    step: Tensor,
    chunk_states: Tensor,
    leaving: Tensor | None,
    dfinal: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch key_value_gradient_kernel and sum its parts. reads: q, dy and what states gave; None for the converter."""
    device = k.device
    launch = job.tuning.backward
    slots, segments = job.heads * job.blocks(launch), len(job.segments)
    q, dy, carried = (k, v, total) if reads is None else reads
    dk = k.new_empty(job.batch, job.tokens, slots, job.n)
    dv = v.new_empty(job.batch, job.tokens, job.heads, job.p)
    ddt = torch.empty(job.batch, job.tokens, slots, dtype=torch.float32, device=device)
    dA = torch.empty(segments, slots, dtype=torch.float32, device=device)
    dD = torch.empty(segments if D is not None else 0, slots, dtype=torch.float32, device=device)
    dstate = _empty(device) if initial_state is None else _new_dstates(job, dfinal, device)
    table, _ = job.segments.on(device)
    if segments:
        kernels.key_value_gradient_kernel[(segments * slots,)](
            q,
            k,
            v,
            dy,
            total,
            step,
            A,
            A if D is None else D,
            chunk_states,
            chunk_states if leaving is None else leaving.contiguous(),
            carried,
            dk,
            dv,
            ddt,
            dA,
            dD,
            dstate,
            table,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *dy.stride()[:3],
            dk.stride(1),
            dv.stride(1),
            A.stride(0),
            0 if D is None else D.stride(0),
            job.tokens,
            job.heads,
            job.heads // job.q_heads,
            job.heads // job.k_heads,
            job.heads // job.v_heads,
            job.heads // job.dt_heads,
            job.heads // job.state_heads,
            job.n,
            job.p,
            job.places,
            READS=reads is not None,
            LEAVING=leaving is not None,
            BY_ROW=job.segments.whole_rows,
            SKIP=D is not None,
            STORE_DSTATE=initial_state is not None,
            **job.constants(launch),
        )
    return (
        _sum_parts(dk, job.k_heads, 2),
        _sum_parts(dv, job.v_heads, 2),
        _sum_parts(ddt, job.dt_heads, 2).to(dt.dtype),
        _sum_parts(dA.sum(0), job.dt_heads, 0).to(A.dtype),
        _empty(device) if D is None else _sum_parts(dD.sum(0), job.heads, 0).to(D.dtype),
        _empty(device) if initial_state is None else _sum_parts(dstate, job.state_heads, 1).to(initial_state.dtype),
    )


def _decays(job: _Job, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """S and dt of every place of every chunk, (dt_heads, places) in fp32."""
    total = torch.empty(job.dt_heads, job.places, dtype=torch.float32, device=dt.device)
    step = torch.empty_like(total)
    table, _ = job.segments.on(dt.device)
    grid = (len(job.segments), job.segments.longest, -(-job.dt_heads // BLOCK_H))
    kernels.decay_kernel[grid](
        dt,
        A,
        total,
        step,
        table,
        *dt.stride(),
        A.stride(0),
        job.dt_heads,
        job.places,
        L=job.tuning.chunk,
        BLOCK_H=BLOCK_H,
        num_warps=4,
    )
    return total, step


def _carry(
    job: _Job,
    x: Tensor,
    z: Tensor,
    total: Tensor,
    step: Tensor,
    entering: Tensor | None,
    *,
    heads: int,
    reverse: bool = False,
    chunks: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run state_kernel: (the states that enter chunks, or nothing; the states left at segments' ends; their decays)."""
    device = x.device
    launch = job.tuning.states
    segments = len(job.segments)
    chunk_states, left, log_decay = _empty(device), _empty(device), _empty(device)
    if chunks:
        dtype = torch.bfloat16 if job.dtype == torch.bfloat16 else torch.float32
        chunk_states = torch.empty(job.segments.num_chunks, heads, job.n, job.p, dtype=dtype, device=device)
    else:
        left = torch.empty(segments, heads, job.n, job.p, dtype=torch.float32, device=device)
        log_decay = torch.empty(segments, heads, dtype=torch.float32, device=device)
    table, _ = job.segments.on(device)
    kernels.state_kernel[(segments * heads * job.blocks(launch),)](
        x,
        z,
        total,
        step,
        total if entering is None else entering.contiguous(),
        chunk_states,
        left,
        log_decay,
        table,
        *x.stride()[:3],
        *z.stride()[:3],
        heads,
        heads // x.shape[2],
        heads // z.shape[2],
        heads // job.dt_heads,
        job.n,
        job.p,
        job.places,
        REVERSE=reverse,
        ENTERING=entering is not None,
        BY_ROW=job.segments.whole_rows,
        STORE_CHUNKS=chunks,
        STORE_LEFT=not chunks,
        **job.constants(launch),
    )
    return chunk_states, left, log_decay


def _recur(
    job: _Job,
    left: Tensor,
    log_decay: Tensor,
    outer: Tensor | None,
    heads: int,
    outer_group: int = 1,
    *,
    final: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run recur_kernel: the state that enters each segment, or (final) the one that leaves each row."""
    device = left.device
    entering, ends = _empty(device), _empty(device)
    if final:
        ends = torch.empty(job.segments.num_rows, heads, job.n, job.p, dtype=torch.float32, device=device)
    else:
        entering = torch.empty_like(left)
    _, first_of_row = job.segments.on(device)
    plane = job.n * job.p
    kernels.recur_kernel[(job.segments.num_rows, heads, -(-plane // RECUR_BLOCK))](
        left,
        log_decay,
        left if outer is None else outer.contiguous(),
        entering,
        ends,
        first_of_row,
        heads,
        outer_group,
        plane,
        REVERSE=reverse,
        OUTER=outer is not None,
        STORE_ENTERING=not final,
        STORE_FINAL=final,
        BLOCK=RECUR_BLOCK,
        num_warps=4,
    )
    return entering, ends


def _resting_state(job: _Job, initial_state: Tensor | None, device: torch.device) -> Tensor:
    """The final state of rows without tokens."""
    if initial_state is not None:
        return initial_state.to(torch.float32, copy=True)
    shape = (job.segments.num_rows, job.state_heads, job.n, job.p)
    return torch.zeros(shape, dtype=torch.float32, device=device)


def _new_states(job: _Job, initial_state: Tensor | None, device: torch.device) -> Tensor:
    """Memory for final states, in which rows without tokens already have theirs."""
    if job.empty_rows():
        return _resting_state(job, initial_state, device)
    shape = (job.segments.num_rows, job.state_heads, job.n, job.p)
    return torch.empty(shape, dtype=torch.float32, device=device)


def _new_dstates(job: _Job, dfinal: Tensor | None, device: torch.device) -> Tensor:
    """Memory for the initial state's gradient, a part per head, in which rows without tokens already have theirs."""
    shape = (job.segments.num_rows, job.heads, job.n, job.p)
    if not job.empty_rows():
        return torch.empty(shape, dtype=torch.float32, device=device)
    dstate = torch.zeros(shape, dtype=torch.float32, device=device)
    if dfinal is not None:
        dstate[:, :: job.heads // job.state_heads] = dfinal
    return dstate


def _empty(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)


def _sum_parts(parts: Tensor, count: int, dim: int) -> Tensor:
    """Sum neighbouring heads' parts in fp32: `count` remain at `dim`; the dtype stays."""
    if parts.shape[dim] == count:
        return parts
    return parts.unflatten(dim, (count, -1)).sum(dim + 1, dtype=torch.float32).to(parts.dtype)


def _readable(x: Tensor) -> Tensor:
    """x with neighbouring entries of the last dimension side by side; other strides may be any."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _block(size: int) -> int:
    """The tile that holds `size`: matrix units want powers of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))
