"""ssd_scan and memory_converter on a GPU: how their kernels are launched, and in which order.

Forward reads q, k and v once and writes y once: a program carries the state of one head over a segment of the sequence.
Where rows are cut into segments, to fill the card, a pass over keys and values comes first, which learns the state that
each segment starts from. Backward stores the state that enters each chunk and the gradient of the one that leaves it,
and then takes all chunks at once. Nothing is added atomically: heads that share an entry write a part each, and parts
are summed in fp32 afterwards, so results are the same bits every time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from transmamba.ops.segments import Segments

from . import kernels

INTERPRETED = not isinstance(kernels.scan_kernel, triton.JITFunction)  # whose products know no bf16
BLOCK_H = 8  # heads per program of the decay kernel
RECUR_BLOCK = 1024  # entries of a state per program of the recurrence between segments


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one kernel runs. block: columns of a state per program or step; stages: of the loads' pipeline."""

    block: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is chosen per shape. programs: how many a launch should have before rows stay whole."""

    chunk: int
    programs: int
    states: Launch
    forward: Launch
    gradients: Launch


def tuning_of(state_size: int, head_dim: int, dtype: torch.dtype) -> Tuning:
    """Return the configuration for these sizes; a table, not a search, so the first call is like every other."""
    n, p = _block(state_size), _block(head_dim)
    if dtype != torch.bfloat16:  # operands of 32 bits
        launch = Launch(block=min(p, 32 if n > 64 else 64), warps=4, stages=1)
        return Tuning(chunk=32, programs=256, states=launch, forward=launch, gradients=launch)
    # Fastest of those in benchmarks/results/ssd_scan_launches_h100_2026-11-24.json.
    states = Launch(block=min(p, 128 if n <= 128 else 64), warps=4 if n <= 64 else 8, stages=2)
    forward = Launch(block=min(p, 64), warps=4 if n <= 128 else 8, stages=3 if n <= 64 else 1)
    gradients = Launch(block=64, warps=4, stages=1)
    return Tuning(chunk=64, programs=256, states=states, forward=forward, gradients=gradients)


@dataclass(frozen=True, kw_only=True)
class Job:
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

    @staticmethod
    def of(
        q_heads: int, k: Tensor, v: Tensor, dt: Tensor, borders: Sequence[int] | None, tuning: Tuning | None = None
    ) -> "Job":
        """The job of inputs of these shapes, in rows of equal length or between borders."""
        sizes = (*map(int, k.shape), int(v.shape[2]), int(v.shape[3]), int(dt.shape[2]))
        return _job(int(q_heads), *sizes, k.dtype, None if borders is None else tuple(borders), tuning)

    @property
    def num_rows(self) -> int:
        return self.segments.num_rows

    @property
    def num_chunks(self) -> int:
        return self.segments.num_chunks

    @property
    def places(self) -> int:
        return self.num_chunks * self.tuning.chunk

    @property
    def operand(self) -> torch.dtype:
        """What products read, and chunks' states are kept in. fp16 is too narrow in range for a state."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @cached_property
    def has_empty_rows(self) -> bool:
        return any(a == b for a, b in pairwise(self.segments.first_of_row))

    @cached_property
    def groups(self) -> tuple[int, int, int, int, int]:
        """How many output heads read one head of q, k, v, dt and the state."""
        counts = (self.q_heads, self.k_heads, self.v_heads, self.dt_heads, self.state_heads)
        a, b, c, d, e = (self.heads // count for count in counts)
        return a, b, c, d, e

    @cached_property
    def carrying(self) -> dict[str, Any]:
        """Compile-time arguments of state_kernel."""
        return self._constants(_block(self.n), self.tuning.states)

    @cached_property
    def scanning(self) -> dict[str, Any]:
        """Compile-time arguments of scan_kernel."""
        return self._constants(_block(self.n), self.tuning.forward)

    @cached_property
    def differentiating(self) -> dict[str, Any]:
        """Compile-time arguments of gradient_kernel, which goes through blocks of both sizes of a state."""
        block_n = min(self.tuning.gradients.block, _block(self.n))
        return self._constants(block_n, self.tuning.gradients) | {"BLOCKS_N": -(-self.n // block_n)}

    def _constants(self, block_n: int, launch: Launch) -> dict[str, Any]:
        block_p = min(launch.block, _block(self.p))
        # tf32 holds all bits of fp16 and has the range of fp32; three products of it are as good as fp32.
        precision = {torch.bfloat16: "ieee", torch.float16: "tf32"}.get(self.dtype, "tf32x3")
        return {
            "L": self.tuning.chunk,
            "BLOCK_N": block_n,
            "BLOCK_P": block_p,
            "BLOCKS_P": -(-self.p // block_p),
            "WHOLE_N": self.n % block_n == 0,
            "WHOLE_P": self.p % block_p == 0,
            "DOT": tl.bfloat16 if self.operand == torch.bfloat16 and not INTERPRETED else tl.float32,
            "PRECISION": precision,
            "num_warps": launch.warps,
            "num_stages": launch.stages,
        }


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
    job = Job.of(q.shape[2], k, v, dt, borders, tuning)
    offset = 0 if before is None else before.shape[1]
    y = v.new_empty(job.batch, offset + job.tokens, job.heads, job.p)
    if before is not None:
        y[:, :offset] = before
    final = _new_states(job, initial_state, k.device)
    if not len(job.segments):
        return y, final, _empty(k.device)
    q, k, v = _readable(q), _readable(k), _readable(v)
    decays = _decays(job, dt, A)
    whole = job.segments.whole_rows
    entering = initial_state if whole else _entering(job, k, v, decays, initial_state)
    out = y[:, offset:]
    table, _ = job.segments.on(k.device)
    kernels.scan_kernel[(len(job.segments) * job.heads * job.scanning["BLOCKS_P"],)](
        q,
        k,
        v,
        *decays,
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
        *job.groups,
        job.n,
        job.p,
        job.places,
        ENTERING=entering is not None,
        BY_ROW=whole,
        SKIP=D is not None,
        **job.scanning,
    )
    return y, final, _empty(k.device) if whole or entering is None else entering


def shapes_of_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    before: Tensor | None,
    borders: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of the shapes that run_scan returns."""
    job = Job.of(q.shape[2], k, v, dt, borders)
    offset = 0 if before is None else before.shape[1]
    y = v.new_empty(k.shape[0], offset + k.shape[1], job.heads, job.p)
    plane = (job.state_heads, job.n, job.p)
    final = k.new_empty(job.num_rows, *plane, dtype=torch.float32)
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
    job = Job.of(q.shape[2], k, v, dt, borders, tuning)
    q, k, v, dy = _readable(q), _readable(k), _readable(v), _readable(dy)
    decays = _decays(job, dt, A)
    whole, group = job.segments.whole_rows, job.groups[-1]
    states, _, _ = _carry(job, k, v, decays, initial_state if whole else entering, job.state_heads, chunks=True)
    leaving = dfinal
    if not whole:
        _, left, log_decay = _carry(job, q, dy, decays, None, job.heads, reverse=True)
        leaving, _ = _recur(job, left, log_decay, dfinal, job.heads, group, reverse=True)
    dinitial = None if initial_state is None else _new_dstates(job, dfinal, k.device)
    dstates, _, _ = _carry(job, q, dy, decays, leaving, job.heads, group, reverse=True, chunks=True, end=dinitial)
    dq, dk, dv, ddt, dA, dD = _gradients(job, (q, dy), k, v, dt, A, D, decays, states, dstates)
    if initial_state is None or dinitial is None:
        return dq, dk, dv, ddt, dA, dD, _empty(k.device)
    return dq, dk, dv, ddt, dA, dD, _sum_parts(dinitial, job.state_heads, 1).to(initial_state.dtype)


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
    job = Job.of(1, k, v, dt, borders, tuning)
    final = _new_states(job, initial_state, k.device)
    if not len(job.segments):
        return final
    k, v = _readable(k), _readable(v)
    decays = _decays(job, dt, A)
    if job.segments.whole_rows:
        _carry(job, k, v, decays, initial_state, job.state_heads, end=final)
        return final
    _, left, log_decay = _carry(job, k, v, decays, None, job.state_heads)
    return _recur(job, left, log_decay, initial_state, job.state_heads, final=True)[1]


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
    job = Job.of(1, k, v, dt, borders, tuning)
    k, v, dfinal = _readable(k), _readable(v), dfinal.contiguous()
    decays = _decays(job, dt, A)
    entering = initial_state if job.segments.whole_rows else _entering(job, k, v, decays, initial_state)
    states, _, _ = _carry(job, k, v, decays, entering, job.state_heads, chunks=True)
    _, dk, dv, ddt, dA, _ = _gradients(job, None, k, v, dt, A, None, decays, states, dfinal)
    if initial_state is None:
        return dk, dv, ddt, dA, _empty(k.device)
    return dk, dv, ddt, dA, (_whole_decays(job, decays) * dfinal).to(initial_state.dtype)


def _gradients(
    job: Job,
    reads: tuple[Tensor, Tensor] | None,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    decays: tuple[Tensor, Tensor],
    states: Tensor,
    dstates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run gradient_kernel and sum its parts. reads: queries and the gradient of the outputs; None for the converter."""
    device = k.device
    q, dy = (k, v) if reads is None else reads
    dq = _empty(device) if reads is None else q.new_empty(job.batch, job.tokens, job.heads, job.n)
    dk = k.new_empty(job.batch, job.tokens, job.heads, job.n)
    dv = v.new_empty(job.batch, job.tokens, job.heads, job.p)
    ddt = torch.empty(job.batch, job.tokens, job.heads, dtype=torch.float32, device=device)
    dA = torch.empty(job.num_chunks, job.heads, dtype=torch.float32, device=device)
    dD = _empty(device) if D is None else torch.empty_like(dA)
    table, _ = job.segments.on(device)
    grid = len(job.segments) * job.segments.longest * job.heads
    if grid:
        kernels.gradient_kernel[(grid,)](
            q,
            k,
            v,
            dy,
            *decays,
            A,
            A if D is None else D,
            states,
            dstates,
            _rest(job, decays) if reads is None else dA,
            dq,
            dk,
            dv,
            ddt,
            dA,
            dD,
            table,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *dy.stride()[:3],
            A.stride(0),
            0 if D is None else D.stride(0),
            job.tokens,
            job.segments.longest,
            job.heads,
            *job.groups,
            job.n,
            job.p,
            job.places,
            READS=reads is not None,
            SKIP=D is not None,
            **job.differentiating,
        )
    return (
        dq if reads is None else _sum_parts(dq, job.q_heads, 2),
        _sum_parts(dk, job.k_heads, 2),
        _sum_parts(dv, job.v_heads, 2),
        _sum_parts(ddt, job.dt_heads, 2).to(dt.dtype),
        _sum_parts(dA.sum(0), job.dt_heads, 0).to(A.dtype),
        dD if D is None else dD.sum(0).to(D.dtype),
    )


def _decays(job: Job, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """S and dt of every place of every chunk, (dt_heads, places) in fp32."""
    total, step = torch.empty(2, job.dt_heads, job.places, dtype=torch.float32, device=dt.device)
    table, _ = job.segments.on(dt.device)
    if job.places:
        kernels.decay_kernel[(len(job.segments), job.segments.longest, -(-job.dt_heads // BLOCK_H))](
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
    job: Job,
    x: Tensor,
    z: Tensor,
    decays: tuple[Tensor, Tensor],
    entering: Tensor | None,
    heads: int,
    group: int = 1,
    *,
    reverse: bool = False,
    chunks: bool = False,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run state_kernel: the states that enter chunks (chunks); what segments leave and their decays (otherwise).

    end: where to write the states that rows end with, instead of what segments leave.
    """
    device = x.device
    by_segment = not chunks and end is None
    states = left = log_decay = _empty(device)
    if chunks:
        states = torch.empty(job.num_chunks, heads, job.n, job.p, dtype=job.operand, device=device)
    if by_segment:
        left = torch.empty(len(job.segments), heads, job.n, job.p, dtype=torch.float32, device=device)
        log_decay = torch.empty(len(job.segments), heads, dtype=torch.float32, device=device)
    table, _ = job.segments.on(device)
    grid = len(job.segments) * heads * job.carrying["BLOCKS_P"]
    if grid:
        kernels.state_kernel[(grid,)](
            x,
            z,
            *decays,
            decays[0] if entering is None else entering.contiguous(),
            states,
            left if end is None else end,
            log_decay,
            table,
            *x.stride()[:3],
            *z.stride()[:3],
            heads,
            heads // x.shape[2],
            heads // z.shape[2],
            heads // job.dt_heads,
            group,
            job.n,
            job.p,
            job.places,
            REVERSE=reverse,
            ENTERING=entering is not None,
            BY_ROW=job.segments.whole_rows,
            STORE_CHUNKS=chunks,
            STORE_LEFT=by_segment,
            STORE_END=end is not None,
            **job.carrying,
        )
    return states, left, log_decay


def _entering(job: Job, k: Tensor, v: Tensor, decays: tuple[Tensor, Tensor], initial_state: Tensor | None) -> Tensor:
    """The state that enters each segment, (segments, state_heads, N, P)."""
    _, left, log_decay = _carry(job, k, v, decays, None, job.state_heads)
    return _recur(job, left, log_decay, initial_state, job.state_heads)[0]


def _recur(
    job: Job,
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
    entering = ends = _empty(device)
    if final:
        ends = torch.empty(job.num_rows, heads, job.n, job.p, dtype=torch.float32, device=device)
    else:
        entering = torch.empty_like(left)
    _, first_of_row = job.segments.on(device)
    plane = job.n * job.p
    kernels.recur_kernel[(job.num_rows, heads, -(-plane // RECUR_BLOCK))](
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


def _rest(job: Job, decays: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of dt A from each chunk's end to its row's, (dt_heads, chunks)."""
    rest = torch.empty(job.dt_heads, job.num_chunks, dtype=torch.float32, device=decays[0].device)
    table, first_of_row = job.segments.on(rest.device)
    kernels.rest_kernel[(job.num_rows, job.dt_heads)](
        decays[0], rest, rest, table, first_of_row, job.places, L=job.tuning.chunk, WHOLE_ROWS=False, num_warps=1
    )
    return rest


def _whole_decays(job: Job, decays: tuple[Tensor, Tensor]) -> Tensor:
    """How much of a state is left after each row, (rows, state_heads, 1, 1)."""
    log_decay = torch.empty(job.num_rows, job.dt_heads, dtype=torch.float32, device=decays[0].device)
    table, first_of_row = job.segments.on(log_decay.device)
    kernels.rest_kernel[(job.num_rows, job.dt_heads)](
        decays[0],
        log_decay,
        log_decay,
        table,
        first_of_row,
        job.places,
        L=job.tuning.chunk,
        WHOLE_ROWS=True,
        num_warps=1,
    )
    return log_decay.exp().repeat_interleave(job.state_heads // job.dt_heads, dim=1)[..., None, None]


def _new_states(job: Job, initial_state: Tensor | None, device: torch.device) -> Tensor:
    """Memory for final states, in which rows without tokens already have theirs."""
    shape = (job.num_rows, job.state_heads, job.n, job.p)
    if not job.has_empty_rows:
        return torch.empty(shape, dtype=torch.float32, device=device)
    if initial_state is not None:
        return initial_state.to(torch.float32, copy=True)
    return torch.zeros(shape, dtype=torch.float32, device=device)


def _new_dstates(job: Job, dfinal: Tensor | None, device: torch.device) -> Tensor:
    """Memory for the initial state's gradient, a part per head, in which rows without tokens already have theirs."""
    shape = (job.num_rows, job.heads, job.n, job.p)
    if not job.has_empty_rows:
        return torch.empty(shape, dtype=torch.float32, device=device)
    dstates = torch.zeros(shape, dtype=torch.float32, device=device)
    if dfinal is not None:
        dstates[:, :: job.groups[-1]] = dfinal
    return dstates


def _sum_parts(parts: Tensor, count: int, dim: int) -> Tensor:
    """Sum neighbouring heads' parts in fp32: `count` remain at `dim`; the dtype stays."""
    if parts.shape[dim] == count:
        return parts
    return parts.unflatten(dim, (count, -1)).sum(dim + 1, dtype=torch.float32).to(parts.dtype)


def _empty(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)


def _readable(x: Tensor) -> Tensor:
    """x itself where its rows lie in one piece and begin at multiples of 16 bytes, as views of a projection do."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _block(size: int) -> int:
    """The tile that holds `size`: matrix units want powers of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


@lru_cache(maxsize=256)  # the layers of a model ask for few, at every step
def _job(
    q_heads: int,
    batch: int,
    tokens: int,
    k_heads: int,
    n: int,
    v_heads: int,
    p: int,
    dt_heads: int,
    dtype: torch.dtype,
    borders: tuple[int, ...] | None,
    tuning: Tuning | None,
) -> Job:
    state_heads = max(k_heads, v_heads, dt_heads)
    heads = max(q_heads, state_heads)
    tuning = tuning or tuning_of(n, p, dtype)
    chunks = batch * -(-tokens // tuning.chunk)
    blocks = -(-p // tuning.forward.block)
    # Fewer programs than asked for means longer segments; so it is for packed rows, however their borders lie.
    per_segment = max(4, -(-chunks * heads * blocks // tuning.programs))
    return Job(
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
        dtype=dtype,
        tuning=tuning,
        segments=Segments.of(batch, tokens, borders, tuning.chunk, per_segment),
    )
