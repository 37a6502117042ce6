"""ssd_scan and memory_converter on a GPU: how their kernels are launched, and in which order.

Forward reads q, k and v once and writes y once: a program carries the state of one head over a segment of the sequence.
Where rows are cut into segments, to fill the card, a pass over keys and values comes first, which learns the state that
each segment starts from. Backward is three sweeps of the same kind, for q, v and k, or (Tuning.sweeps = None) stores
the state that enters each chunk and the gradient of the one that leaves it, and then takes all chunks at once; it keeps
the decays of forward. Nothing is added atomically: heads that share an entry write a part each, and parts are summed in
fp32 afterwards, so results are the same bits every time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from transmamba.ops.launching import launch, on_its_device
from transmamba.ops.segments import Segments
from transmamba.ops.tunings import find_tuning

from . import kernels

INTERPRETED = not isinstance(kernels.scan_kernel, triton.JITFunction)  # whose products know no bf16
BLOCK_H = 8  # heads per program of the decay kernel
RECUR_BLOCK = 1024  # entries of a state per program of the recurrence between segments
MOST_STRIDE = 1 << 24  # from token to token; sweep_kernel's offsets within a chunk have 32 bits


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How one kernel runs. block: columns of a state per program or step; stages: of the loads' pipeline.

    registers: the most a thread may have, so that more programs run at once; None leaves it to the compiler.
    """

    block: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is chosen per shape. programs: how many a launch should have before rows stay whole.

    cut_programs: how many there should be where rows are cut, if more.
    sweeps: how sweep_kernel runs for gradients; with None they come from stored states, by gradient_kernel.
    forward_sweeps: whether sweep_kernel takes scan_kernel's place in forward too.
    """

    chunk: int
    programs: int
    states: Launch
    forward: Launch
    gradients: Launch
    sweeps: Launch | None = None
    forward_sweeps: bool = False
    cut_programs: int = 0


def tuning_of(state_size: int, head_dim: int, dtype: torch.dtype) -> Tuning:
    """Return the configuration for these sizes: what was measured on this device, in place of the rule's."""
    rule = _rule(state_size, head_dim, dtype)
    measured = find_tuning("ssd_scan", state_size=state_size, head_dim=head_dim, dtype=str(dtype)) or {}
    changes: dict[str, Any] = {name: Launch(**x) if isinstance(x, dict) else x for name, x in measured.items()}
    return replace(rule, **changes)


def _rule(state_size: int, head_dim: int, dtype: torch.dtype) -> Tuning:
    n, p = _blocks(state_size, head_dim)
    if dtype != torch.bfloat16:  # operands of 32 bits
        launch = Launch(block=min(p, 32 if n > 64 else 64), warps=4, stages=1)
        sweeps = Launch(block=32 if max(n, p) > 64 else 64, warps=4, stages=1)
        return Tuning(chunk=32, programs=256, states=launch, forward=launch, gradients=launch, sweeps=sweeps)
    # Fastest of those in benchmarks/results/ssd_scan_launches_h100_2026-11-24.json and ssd_sweeps_h200_2026-11-30.json.
    states = Launch(block=min(p, 128 if n <= 128 else 64), warps=4 if n <= 64 else 8, stages=2)
    swept = n == p == 128
    forward = Launch(block=min(p, 64), warps=4 if n <= 128 else 8, stages=3 if n <= 64 else 2 if swept else 1)
    gradients = Launch(block=64, warps=4, stages=1 if n <= 64 else 2)
    # Of the sweeps, two take heads for the other side of a state.
    sweeps = Launch(block=64, warps=4 if max(n, p) <= 128 else 8, stages=3 if max(n, p) <= 64 else 1)
    return Tuning(
        chunk=64,
        programs=256,
        cut_programs=512 if max(n, p) <= 64 else 256,
        states=states,
        forward=forward,
        gradients=gradients,
        sweeps=sweeps,
        forward_sweeps=swept,
    )


@contextmanager
def configured(**changes: Any) -> Iterator[None]:
    """Launch otherwise within: with another field of Tuning. For trials and tests."""
    before = dict(_changes)
    _changes.update(changes)
    _job.cache_clear()
    try:
        yield
    finally:
        _changes.clear()
        _changes.update(before)
        _job.cache_clear()


_changes: dict[str, Any] = {}


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
    def of(q_heads: int, k: Tensor, v: Tensor, dt: Tensor, borders: Sequence[int] | None) -> "Job":
        """The job of inputs of these shapes, in rows of equal length or between borders."""
        sizes = (q_heads, *k.shape, *v.shape[2:], dt.shape[2])  # symbols where torch.compile leaves a size open
        sizes = sizes if all(type(size) is int for size in sizes) else tuple(map(int, sizes))
        return _job(*sizes, k.dtype, None if borders is None else tuple(borders))

    @cached_property
    def num_rows(self) -> int:
        return self.segments.num_rows

    @cached_property
    def num_chunks(self) -> int:
        return self.segments.num_chunks

    @cached_property
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

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The table of segments, and the first segment of each row."""
        return self.segments.on(device)

    @cached_property
    def carrying(self) -> dict[str, Any]:
        """Compile-time arguments of state_kernel."""
        return self._constants(self.n, self.p, _blocks(self.n, self.p)[0], self.tuning.states)

    @cached_property
    def scanning(self) -> dict[str, Any]:
        """Compile-time arguments of scan_kernel."""
        return self._constants(self.n, self.p, _blocks(self.n, self.p)[0], self.tuning.forward)

    @cached_property
    def differentiating(self) -> dict[str, Any]:
        """Compile-time arguments of gradient_kernel, which goes through blocks of both sizes of a state."""
        block_n = min(self.tuning.gradients.block, _blocks(self.n, self.p)[0])
        return self._constants(self.n, self.p, block_n, self.tuning.gradients) | {"BLOCKS_N": -(-self.n // block_n)}

    def sweeping(self, launch: Launch, *, transposed: bool) -> dict[str, Any]:
        """Compile-time arguments of sweep_kernel, for a state or its transpose."""
        n, p = (self.p, self.n) if transposed else (self.n, self.p)
        return self._constants(n, p, _blocks(n, p)[0], launch)

    def _constants(self, n: int, p: int, block_n: int, launch: Launch) -> dict[str, Any]:
        block_p = min(launch.block, _blocks(n, p)[1])
        # tf32 holds all bits of fp16 and has the range of fp32; three products of it are as good as fp32.
        precision = {torch.bfloat16: "ieee", torch.float16: "tf32"}.get(self.dtype, "tf32x3")
        # The interpreter knows no registers.
        limit = {} if launch.registers is None or INTERPRETED else {"maxnreg": launch.registers}
        return {
            "L": self.tuning.chunk,
            "BLOCK_N": block_n,
            "BLOCK_P": block_p,
            "BLOCKS_P": -(-p // block_p),
            "WHOLE_N": n % block_n == 0,
            "WHOLE_P": p % block_p == 0,
            "DOT": tl.bfloat16 if self.operand == torch.bfloat16 and not INTERPRETED else tl.float32,
            "PRECISION": precision,
            "num_warps": launch.warps,
            "num_stages": launch.stages,
            **limit,
        }


class Scanned(NamedTuple):
    """What run_scan returns. The last two are for the gradients, and `entering` is empty where rows are whole."""

    y: Tensor
    state: Tensor
    entering: Tensor  # the states that segments start from
    decays: Tensor  # (2, dt_heads, places) in fp32: S and dt of every place of every chunk


class Converted(NamedTuple):
    """What run_converter returns; the last two as in Scanned."""

    state: Tensor
    entering: Tensor
    decays: Tensor


@on_its_device
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
) -> Scanned:
    """Run the scan; y begins with `before`."""
    job = Job.of(q.shape[2], k, v, dt, borders)
    offset = 0 if before is None else before.shape[1]
    y = out = v.new_empty(job.batch, offset + job.tokens, job.heads, job.p)
    if before is not None:
        y[:, :offset] = before
        out = y[:, offset:]
    state = _new_states(job, initial_state, k.device)
    if not len(job.segments):
        return Scanned(y, state, _empty(k.device), _empty(k.device))
    q, k, v = _readable(q), _readable(k), _readable(v)
    decays = _decays(job, dt, A)
    whole = job.segments.whole_rows
    entering = initial_state if whole else _entering(job, k, v, decays, initial_state)
    kept = _empty(k.device) if whole or entering is None else entering
    if job.tuning.forward_sweeps:
        ends: dict[str, Any] = {
            "entering": entering,
            "entering_group": job.groups[-1],
            "end": state,
            "end_group": job.groups[-1],
        }
        _sweep(job, job.tuning.forward, q, k, v, decays, out, D=D, **ends)
        return Scanned(y, state, kept, decays)
    launch(
        kernels.scan_kernel,
        (len(job.segments) * job.heads * job.scanning["BLOCKS_P"], 1, 1),
        (
            *(q, k, v, decays),
            v if D is None else D,
            v if entering is None else entering.contiguous(),
            *(out, state, job.on(k.device)[0]),
        ),
        (
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
            0 if D is None else D.stride(0),
            *(job.heads, *job.groups, job.n, job.p, job.places),
        ),
        {"ENTERING": entering is not None, "BY_ROW": whole, "SKIP": D is not None, **job.scanning},
    )
    return Scanned(y, state, kept, decays)


def shapes_of_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    before: Tensor | None,
    borders: Sequence[int] | None,
) -> Scanned:
    """Empty tensors of the shapes that run_scan returns."""
    job = Job.of(q.shape[2], k, v, dt, borders)
    offset = 0 if before is None else before.shape[1]
    y = v.new_empty(k.shape[0], offset + k.shape[1], job.heads, job.p)
    return Scanned(y, *_shapes_of_states(job, k))


@on_its_device
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
    decays: Tensor,
    borders: Sequence[int] | None,
    rooms: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, dt, A, D and the initial state; the last two are empty where there is no such input.

    rooms: where to write those of q, k, v and dt; each may be some tokens of a longer tensor.
    """
    job = Job.of(q.shape[2], k, v, dt, borders)
    rooms = _rooms(q, k, v, dt) if rooms is None else rooms
    if not len(job.segments):
        dinitial = _empty(k.device) if initial_state is None else torch.zeros_like(initial_state)
        if dfinal is not None and initial_state is not None:
            dinitial = dfinal.to(initial_state.dtype, copy=True)
        return *rooms, torch.zeros_like(A), _empty(k.device) if D is None else torch.zeros_like(D), dinitial
    q, k, v, dy = _readable(q), _readable(k), _readable(v), _readable(dy)
    whole, group = job.segments.whole_rows, job.groups[-1]
    before, leaving = initial_state if whole else entering, dfinal
    if not whole:
        _, left, log_decay = _carry(job, q, dy, decays, None, job.heads, reverse=True)
        leaving, _ = _recur(job, left, log_decay, dfinal, job.heads, group, reverse=True)
    ends = None if initial_state is None else _new_dstates(job, dfinal, k.device)
    if job.tuning.sweeps is not None:
        dA, dD = _swept_gradients(job, job.tuning.sweeps, q, k, v, dy, A, D, decays, before, leaving, ends, rooms)
    else:
        states, _, _ = _carry(job, k, v, decays, before, job.state_heads, chunks=True)
        dstates, _, _ = _carry(job, q, dy, decays, leaving, job.heads, group, reverse=True, chunks=True, end=ends)
        dA, dD = _gradients(job, (q, dy), k, v, A, D, decays, states, dstates, rooms)
    if initial_state is None or ends is None:
        return *rooms, dA, dD, _empty(k.device)
    if job.state_heads != job.heads:
        ends = ends.unflatten(1, (job.state_heads, -1)).sum(2)
    return *rooms, dA, dD, ends.to(initial_state.dtype)


@on_its_device
def run_converter(
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
) -> Converted:
    """Compute the state after each row; see memory_converter."""
    job = Job.of(1, k, v, dt, borders)
    if not len(job.segments):
        return Converted(_new_states(job, initial_state, k.device), _empty(k.device), _empty(k.device))
    k, v = _readable(k), _readable(v)
    decays = _decays(job, dt, A)
    if job.segments.whole_rows:
        state = _new_states(job, initial_state, k.device)
        _carry(job, k, v, decays, initial_state, job.state_heads, end=state)
        return Converted(state, _empty(k.device), decays)
    _, left, log_decay = _carry(job, k, v, decays, None, job.state_heads)
    entering, state = _recur(job, left, log_decay, initial_state, job.state_heads, final=True)
    return Converted(state, entering, decays)


def shapes_of_converter(
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    initial_state: Tensor | None,
    borders: Sequence[int] | None,
) -> Converted:
    """Empty tensors of the shapes that run_converter returns."""
    return Converted(*_shapes_of_states(Job.of(1, k, v, dt, borders), k))


@on_its_device
def run_converter_backward(
    dfinal: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    initial_state: Tensor | None,
    entering: Tensor,
    decays: Tensor,
    borders: Sequence[int] | None,
    rooms: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of k, v, dt, A and the initial state; the last is empty where there is no such input.

    rooms: where to write those of k, v and dt.
    """
    job = Job.of(1, k, v, dt, borders)
    rooms = _rooms(k, v, dt) if rooms is None else rooms
    if not len(job.segments):
        dinitial = _empty(k.device) if initial_state is None else dfinal.to(initial_state.dtype, copy=True)
        return *rooms, torch.zeros_like(A), dinitial
    k, v, dfinal = _readable(k), _readable(v), dfinal.contiguous()
    before = initial_state if job.segments.whole_rows else entering
    states, _, _ = _carry(job, k, v, decays, before, job.state_heads, chunks=True)
    dA, _ = _gradients(job, None, k, v, A, None, decays, states, dfinal, rooms)
    if initial_state is None:
        return *rooms, dA, _empty(k.device)
    return *rooms, dA, (_whole_decays(job, decays) * dfinal).to(initial_state.dtype)


def _gradients(
    job: Job,
    reads: tuple[Tensor, Tensor] | None,
    k: Tensor,
    v: Tensor,
    A: Tensor,
    D: Tensor | None,
    decays: Tensor,
    states: Tensor,
    dstates: Tensor,
    rooms: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Run gradient_kernel, sum its parts into rooms; return the gradients of A and D, the latter empty without D.

    reads: queries and the gradient of the outputs; None for the converter, whose rooms begin with that of k.
    """
    device = k.device
    q, dy = (k, v) if reads is None else reads
    parts = [_part(job, room) for room in rooms]
    dq, dk, dv, ddt = parts if reads is not None else (parts[0], *parts)
    rates = torch.empty(1 if D is None else 2, job.num_chunks, job.heads, dtype=torch.float32, device=device)
    launch(
        kernels.gradient_kernel,
        (len(job.segments) * job.segments.longest * job.heads, 1, 1),
        (
            *(q, k, v, dy, decays, A),
            A if D is None else D,
            *(states, dstates),
            _rest(job, decays) if reads is None else rates,
            *(dq, dk, dv, ddt, rates, job.on(device)[0]),
        ),
        (
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dy.stride()[:3]),
            *_batch_strides(dq, dk, dv, ddt),
            A.stride(0),
            0 if D is None else D.stride(0),
            *(job.segments.longest, job.heads, *job.groups, job.n, job.p, job.places),
        ),
        {"READS": reads is not None, "SKIP": D is not None, **job.differentiating},
    )
    for part, room in zip(parts, rooms, strict=True):
        _sum_parts(part, room)
    sums = rates.sum(1)
    return _sum_rates(job, sums[0]).to(A.dtype), _empty(device) if D is None else sums[1].to(D.dtype)


def _swept_gradients(
    job: Job,
    how: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    A: Tensor,
    D: Tensor | None,
    decays: Tensor,
    before: Tensor | None,
    leaving: Tensor | None,
    ends: Tensor | None,
    rooms: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The same in three sweeps and one kernel for the steps: see sweep_kernel for who takes which part.

    before, leaving: states and their gradients that rows or segments start from, forward and in reverse. ends: where to
    write the gradients of initial states.
    """
    device = k.device
    dq, dk, dv, ddt = parts = [_part(job, room) for room in rooms]
    blocks = job.sweeping(how, transposed=True)["BLOCKS_P"]
    reads = torch.empty(blocks, job.heads, job.places, dtype=torch.float32, device=device)
    writes = torch.empty(2, *reads.shape, dtype=torch.float32, device=device)
    states = torch.empty(job.num_chunks, job.heads, job.p, job.n, dtype=job.operand, device=device)
    flows = torch.empty(blocks, job.num_chunks, job.heads, dtype=torch.float32, device=device)
    diagonals = None if D is None else torch.empty(len(job.segments), job.heads, dtype=torch.float32, device=device)
    group = job.groups[-1]
    forward: dict[str, Any] = {"entering": before, "entering_group": group, "transposed": True}
    _sweep(job, how, dy, v, k, decays, dq, other=q, sums=reads, states=states, diagonals=diagonals, **forward)
    group = group if job.segments.whole_rows else 1
    reverse: dict[str, Any] = {"entering": leaving, "entering_group": group, "reverse": True}
    _sweep(job, how, k, q, dy, decays, dv, D=D, end=ends, **reverse)
    _sweep(job, how, v, dy, q, decays, dk, other=k, sums=writes, states=states, flows=flows, transposed=True, **reverse)
    rates = torch.empty(job.num_chunks, job.heads, dtype=torch.float32, device=device)
    launch(
        kernels.step_gradient_kernel,
        (len(job.segments), job.segments.longest, -(-job.heads // BLOCK_H)),
        (reads, writes, flows, decays, A, ddt, rates, job.on(device)[0]),
        (ddt.stride(0), A.stride(0), job.heads, job.groups[3], job.places),
        {"L": job.tuning.chunk, "BLOCK_H": BLOCK_H, "BLOCKS": blocks, "num_warps": 4},
    )
    for part, room in zip(parts, rooms, strict=True):
        _sum_parts(part, room)
    dA = _sum_rates(job, rates.sum(0)).to(A.dtype)
    return dA, _empty(device) if D is None or diagonals is None else diagonals.sum(0).to(D.dtype)


def _sweep(
    job: Job,
    how: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor,
    y: Tensor,
    *,
    D: Tensor | None = None,
    other: Tensor | None = None,
    sums: Tensor | None = None,
    states: Tensor | None = None,
    flows: Tensor | None = None,
    diagonals: Tensor | None = None,
    entering: Tensor | None = None,
    entering_group: int = 1,
    end: Tensor | None = None,
    end_group: int = 1,
    reverse: bool = False,
    transposed: bool = False,
) -> None:
    """Run sweep_kernel with q, k, v and y in these parts; what is not given is left out. states: read with flows."""
    constants = job.sweeping(how, transposed=transposed)
    rest = v if other is None else other
    of_heads = [job.heads // x.shape[2] for x in (q, k, v, rest)]
    n, p = (job.p, job.n) if transposed else (job.n, job.p)
    launch(
        kernels.sweep_kernel,
        (len(job.segments) * job.heads * constants["BLOCKS_P"], 1, 1),
        (
            *(q, k, v, rest, decays),
            v if D is None else D,
            decays if entering is None else entering.contiguous(),
            y,
            *(decays if x is None else x for x in (end, sums, states, flows, diagonals)),
            job.on(q.device)[0],
        ),
        (
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *rest.stride()[:3], *y.stride()[:3]),
            0 if D is None else D.stride(0),
            *(job.heads, *of_heads, job.groups[3], entering_group, end_group, n, p, job.places),
        ),
        {
            "REVERSE": reverse,
            "TRANSPOSED": transposed,
            "ENTERING": entering is not None,
            "BY_ROW": job.segments.whole_rows,
            "SKIP": D is not None,
            "SUMS": sums is not None,
            "DIAGONAL": diagonals is not None,
            "STORE_STATES": states is not None and flows is None,
            "FLOWS": flows is not None,
            "STORE_END": end is not None,
            **constants,
        },
    )


def _sum_rates(job: Job, dA: Tensor) -> Tensor:
    """Sum A's gradients over heads that share an entry."""
    return dA if job.dt_heads == job.heads else dA.unflatten(0, (job.dt_heads, -1)).sum(1)


def _rooms(*inputs: Tensor) -> list[Tensor]:
    """Memory for the gradients of these inputs, in one piece each."""
    return [x.new_empty(x.shape) for x in inputs]


def _part(job: Job, room: Tensor) -> Tensor:
    """Where gradient_kernel writes a part per head: `room` itself where it has as many heads."""
    if room.shape[2] == job.heads:
        return room
    # Steps are summed in fp32, as they are computed.
    return room.new_empty(
        job.batch, job.tokens, job.heads, *room.shape[3:], dtype=room.dtype if room.dim() == 4 else torch.float32
    )


def _decays(job: Job, dt: Tensor, A: Tensor) -> Tensor:
    """S and dt of every place of every chunk, (2, dt_heads, places) in fp32."""
    decays = torch.empty(2, job.dt_heads, job.places, dtype=torch.float32, device=dt.device)
    launch(
        kernels.decay_kernel,
        (len(job.segments), job.segments.longest, -(-job.dt_heads // BLOCK_H)),
        (dt, A, decays, job.on(dt.device)[0]),
        (*dt.stride(), A.stride(0), job.dt_heads, job.places),
        {"L": job.tuning.chunk, "BLOCK_H": BLOCK_H, "num_warps": 4},
    )
    return decays


def _carry(
    job: Job,
    x: Tensor,
    z: Tensor,
    decays: Tensor,
    entering: Tensor | None,
    heads: int,
    group: int = 1,
    *,
    reverse: bool = False,
    chunks: bool = False,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run state_kernel: the states that enter chunks (chunks); what segments leave and their decays (otherwise).

    end: where to write the states that rows end with, instead of what segments leave. What was not asked for is some
    other tensor.
    """
    device = x.device
    by_segment = not chunks and end is None
    states = left = log_decay = decays
    if chunks:
        states = torch.empty(job.num_chunks, heads, job.n, job.p, dtype=job.operand, device=device)
    if by_segment:
        left = torch.empty(len(job.segments), heads, job.n, job.p, dtype=torch.float32, device=device)
        log_decay = torch.empty(len(job.segments), heads, dtype=torch.float32, device=device)
    launch(
        kernels.state_kernel,
        (len(job.segments) * heads * job.carrying["BLOCKS_P"], 1, 1),
        (
            *(x, z, decays),
            decays if entering is None else entering.contiguous(),
            states,
            left if end is None else end,
            *(log_decay, job.on(device)[0]),
        ),
        (
            *(*x.stride()[:3], *z.stride()[:3], heads, heads // x.shape[2], heads // z.shape[2]),
            *(heads // job.dt_heads, group, job.n, job.p, job.places),
        ),
        {
            "REVERSE": reverse,
            "ENTERING": entering is not None,
            "BY_ROW": job.segments.whole_rows,
            "STORE_CHUNKS": chunks,
            "STORE_LEFT": by_segment,
            "STORE_END": end is not None,
            **job.carrying,
        },
    )
    return states, left, log_decay


def _entering(job: Job, k: Tensor, v: Tensor, decays: Tensor, initial_state: Tensor | None) -> Tensor:
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
    """Run recur_kernel: the state that enters each segment, and (final) the one that leaves each row."""
    entering = ends = torch.empty_like(left)
    if final:
        ends = torch.empty(job.num_rows, heads, job.n, job.p, dtype=torch.float32, device=left.device)
    plane = job.n * job.p
    launch(
        kernels.recur_kernel,
        (job.num_rows, heads, -(-plane // RECUR_BLOCK)),
        (
            *(left, log_decay),
            left if outer is None else outer.contiguous(),
            *(entering, ends, job.on(left.device)[1]),
        ),
        (heads, outer_group, plane),
        {
            "REVERSE": reverse,
            "OUTER": outer is not None,
            "STORE_FINAL": final,
            "BLOCK": RECUR_BLOCK,
            "num_warps": 4,
        },
    )
    return entering, ends


def _rest(job: Job, decays: Tensor) -> Tensor:
    """The sum of dt A / ln 2 from each chunk's end to its row's, (dt_heads, chunks)."""
    rest = torch.empty(job.dt_heads, job.num_chunks, dtype=torch.float32, device=decays.device)
    _run_rest(job, decays, rest, whole_rows=False)
    return rest


def _whole_decays(job: Job, decays: Tensor) -> Tensor:
    """How much of a state is left after each row, (rows, state_heads, 1, 1)."""
    log_decay = torch.empty(job.num_rows, job.dt_heads, dtype=torch.float32, device=decays.device)
    _run_rest(job, decays, log_decay, whole_rows=True)
    return log_decay.exp2().repeat_interleave(job.state_heads // job.dt_heads, dim=1)[..., None, None]


def _run_rest(job: Job, decays: Tensor, out: Tensor, *, whole_rows: bool) -> None:
    launch(
        kernels.rest_kernel,
        (job.num_rows, job.dt_heads, 1),
        (decays, out, *job.on(decays.device)),
        (job.places,),
        {"L": job.tuning.chunk, "WHOLE_ROWS": whole_rows, "num_warps": 1},
    )


def _shapes_of_states(job: Job, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors like final states, the states that segments start from, and decays."""
    plane = (job.state_heads, job.n, job.p)
    segments = len(job.segments)
    return (
        k.new_empty((job.num_rows, *plane), dtype=torch.float32),
        k.new_empty((0,) if job.segments.whole_rows else (segments, *plane), dtype=torch.float32),
        k.new_empty((2, job.dt_heads, job.places) if segments else (0,), dtype=torch.float32),
    )


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


def _sum_parts(parts: Tensor, out: Tensor) -> None:
    """Sum neighbouring heads' parts, (batch, tokens, heads, ...), into `out`; torch sums 16 bits in fp32."""
    if parts is not out:
        torch.sum(parts.unflatten(2, (out.shape[2], -1)), 3, dtype=out.dtype, out=out)


def _empty(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)


def _batch_strides(*tensors: Tensor) -> list[int]:
    return [x.stride(0) for x in tensors]


def _readable(x: Tensor) -> Tensor:
    """x itself where its rows lie in one piece and begin at multiples of 16 bytes, as views of a projection do."""
    *outer, last = x.stride()
    step = 16 // x.element_size()
    aligned = last == 1 and x.data_ptr() % 16 == 0 and not any(stride % step for stride in outer)
    aligned = aligned and x.stride(1) < MOST_STRIDE
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _block(size: int) -> int:
    """The tile that holds `size`: matrix units want powers of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


def _blocks(n: int, p: int) -> tuple[int, int]:
    """Tiles that hold a state's n and p, neither narrower than the other up to 64.

    With tiles of 64 x 32 and 16 x 64 Triton 3.6 made gradients of bf16 wrong on Hopper, or read outside the memory.
    """
    least = min(64, max(_block(n), _block(p)))
    return max(_block(n), least), max(_block(p), least)


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
) -> Job:
    state_heads = max(k_heads, v_heads, dt_heads)
    heads = max(q_heads, state_heads)
    tuning = replace(tuning_of(n, p, dtype), **_changes)
    chunks = batch * -(-tokens // tuning.chunk)
    blocks = -(-p // tuning.forward.block)
    # Fewer programs than asked for means longer segments; so it is for packed rows, however their borders lie.
    per_segment = max(4, -(-chunks * heads * blocks // tuning.programs))
    if borders is not None or per_segment * tuning.chunk < tokens:
        per_segment = max(4, -(-chunks * heads * blocks // max(tuning.programs, tuning.cut_programs)))
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
