"""selective_scan on a GPU: how its kernels are launched, and in which order.

Forward reads every input once and writes y once: a program carries the states of some channels through a whole row.
Where rows and channels are too few to fill the card, rows are cut into segments, and a pass without outputs comes
first, which learns the state that each segment starts from. Backward computes the state that enters each few tokens
anew and stores it, and then walks from the end. Nothing is added atomically: blocks of channels write a part each of
the gradients of B and C, and segments of those of A, D and delta_bias; parts are summed in fp32 afterwards.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from transmamba.ops.launching import launch
from transmamba.ops.segments import Segments

from . import kernels

LANES = 32
RECUR_BLOCK = 256  # entries of a state per program of the recurrence between segments


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a program, one warp, holds states and channels (see kernels.py), and how many programs there should be.

    tokens: loaded at a time, and in a chunk of backward. channels: of a program. states: of a thread of forward;
    backward_states: of backward. registers: of a thread, at most, backward_registers: of the gradients'. With `whole`
    programs rows stay whole; where they are cut, `programs` result.
    """

    tokens: int
    channels: int
    states: int
    backward_states: int
    registers: int
    backward_registers: int
    whole: int
    programs: int

    def constants(self, state_size: int, states: int) -> dict[str, int]:
        """Compile-time arguments of the kernels whose threads hold so many states, and how they are launched."""
        threads = triton.next_power_of_2(state_size) // states  # to all states of a channel
        lanes = LANES // threads
        return {"T": self.tokens, "NI": states, "K": self.channels // lanes, "NL": threads, "D": lanes, "num_warps": 1}


def tuning_of(state_size: int) -> Tuning:
    """Return the configuration for this size; a table, not a search; registers by
    benchmarks/results/selective_scan_variants_h200_2026-12-01.json.

    A thread of the gradients holds up to 16 entries of a tile, of 4 tokens; more do not fit its registers.
    """
    n = triton.next_power_of_2(state_size)
    return Tuning(
        tokens=4,
        channels=min(LANES, 16 * LANES // n),
        states=n if n <= 16 else 4,
        backward_states=min(n, 4),
        registers=168,  # of which a multiprocessor has enough for 12 warps, an H100 for 1584
        backward_registers=255,  # at 168, half of a warp's time went by in waiting for spilled ones
        whole=1024,
        programs=1536,
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything about one call but its tensors."""

    batch: int
    dim: int
    tokens: int
    states: int
    B_groups: int
    C_groups: int
    tuning: Tuning
    segments: Segments

    @staticmethod
    def of(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> "Job":
        """The job of inputs of these shapes."""
        groups = (1 if x.dim() == 3 else int(x.shape[1]) for x in (B, C))
        return _job(*map(int, u.shape), int(A.shape[1]), *groups)

    @cached_property
    def groups(self) -> int:
        """Of channels that read the same B and the same C."""
        return math.lcm(self.B_groups, self.C_groups)

    @cached_property
    def channels(self) -> int:
        return self.dim // self.groups

    @cached_property
    def blocks(self) -> int:
        """Blocks of channels in a group."""
        return -(-self.channels // self.tuning.channels)

    @cached_property
    def programs(self) -> int:
        return len(self.segments) * self.groups * self.blocks

    @cached_property
    def forward(self) -> dict[str, int]:
        """Constants of the kernel that writes outputs."""
        return self.tuning.constants(self.states, self.tuning.states)

    @cached_property
    def backward(self) -> dict[str, int]:
        """Constants of all other kernels."""
        return self.tuning.constants(self.states, self.tuning.backward_states)

    @cached_property
    def whole(self) -> bool:
        return self.segments.whole_rows


@dataclass(frozen=True, kw_only=True)
class Call:
    """The tensors of one call as the kernels read them; see `read`."""

    job: Job
    softplus: bool
    u: Tensor
    delta: Tensor
    A: Tensor
    BC: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None

    @staticmethod
    def read(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        bias: Tensor | None,
        softplus: bool,
    ) -> "Call":
        """Copies of those tensors of which neighbouring channels are not neighbours in memory, and B beside C."""
        job = Job.of(u, A, B, C)
        return Call(
            job=job,
            softplus=softplus,
            u=dense(u),
            delta=dense(delta),
            A=A.to(torch.float32).T.contiguous(),
            BC=side_by_side(B, C, job.groups),
            D=None if D is None else D.contiguous(),
            z=None if z is None else dense(z),
            bias=None if bias is None else bias.contiguous(),
        )

    @property
    def flags(self) -> dict[str, bool]:
        return {"SOFTPLUS": self.softplus, "BIAS": self.bias is not None, "GATE": self.z is not None}

    @property
    def strides(self) -> dict[str, int]:
        """From one token to the next, and sizes: known to the compiler (see kernels.py)."""
        return {
            "U_T": self.u.stride(2),
            "DELTA_T": self.delta.stride(2),
            "Z_T": self.present(self.z).stride(2),
            "DIM": self.job.dim,
            "STATES": self.job.states,
        }

    def present(self, x: Tensor | None) -> Tensor:
        """x, or something in its place that no kernel reads."""
        return self.u if x is None else x

    def states(self, *rows: int) -> Tensor:
        """Memory for states, (..., states, dim)."""
        return torch.empty(*rows, self.job.states, self.job.dim, dtype=torch.float32, device=self.u.device)


def run_scan(call: Call, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, last state, the states that segments start from, empty where rows are whole)."""
    job = call.job
    y = call.u.new_empty(job.batch, job.tokens, job.dim)
    if not len(job.segments):
        return y.transpose(1, 2), last_of_nothing(call, initial_state), _empty(call)
    last = call.states(job.batch)
    first = None if initial_state is None else inside_out(initial_state)
    if job.whole:
        _scan(call, first, y=y, last=last)
        return y.transpose(1, 2), last.transpose(1, 2), _empty(call)
    left, total = call.states(len(job.segments)), torch.empty(len(job.segments), job.dim, device=call.u.device)
    _scan(call, None, left=left, total=total)
    entering = _recur(call, left, total, first, reverse=False)
    _scan(call, entering, y=y, last=last)
    return y.transpose(1, 2), last.transpose(1, 2), entering


def shapes_of_scan(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of the shapes that run_scan returns."""
    job = Job.of(u, A, B, C)
    y = u.new_empty(u.shape[0], u.shape[2], u.shape[1]).transpose(1, 2)
    last = u.new_empty(u.shape[0], A.shape[1], u.shape[1], dtype=torch.float32).transpose(1, 2)
    shape = (0,) if job.whole else (len(job.segments), job.states, job.dim)
    return y, last, u.new_empty(shape, dtype=torch.float32)


def run_scan_backward(
    call: Call, initial_state: Tensor | None, entering: Tensor, dy: Tensor, dlast: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and the initial state; of those that are absent, empty.

    All are fp32 but those of u, delta and z; B's and C's are (batch, groups, states, tokens).
    """
    job = call.job
    dy, count = dense(dy), len(job.segments)
    leaving = None if dlast is None else inside_out(dlast)
    if not count:
        return _gradients_of_nothing(call, initial_state, dlast)
    first = None if initial_state is None else inside_out(initial_state)
    tiles = (job.segments.num_chunks, job.groups * job.blocks, triton.next_power_of_2(job.states), job.tuning.channels)
    chunk_states = torch.empty(tiles, device=dy.device)
    total = _empty(call) if job.whole else torch.empty(count, job.dim, device=dy.device)
    # The sums of steps are wanted again between segments; the states at their ends are not.
    left = _empty(call) if job.whole else call.states(count)
    _scan(call, first if job.whole else entering, chunk_states=chunk_states, left=left, total=total)
    if not job.whole:
        leaving = _recur(call, _costates(call, dy), total, leaving, reverse=True)
    dfirst = None if initial_state is None else call.states(job.batch)
    return (
        *_gradients(call, dy, chunk_states, leaving, dfirst),
        _empty(call) if dfirst is None else _outside_in(dfirst),
    )


def _scan(
    call: Call,
    entering: Tensor | None,
    *,
    y: Tensor | None = None,
    last: Tensor | None = None,
    chunk_states: Tensor | None = None,
    left: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Run scan_kernel for those of its outputs that are given; left and total count only where rows are cut."""
    job = call.job
    by_segment = left is not None and not job.whole
    end, steps = (left, total) if by_segment else (last, None)
    launch(
        kernels.scan_kernel,
        (job.programs, 1, 1),
        (
            *(call.u, call.delta, call.A, call.BC),
            *map(call.present, (call.D, call.z, call.bias)),
            call.A if entering is None else entering,
            call.present(y),
            call.A if chunk_states is None else chunk_states,
            call.A if end is None else end,
            call.A if steps is None else steps,
            job.segments.on(call.u.device)[0],
        ),
        (
            *(call.u.stride(0), call.delta.stride(0), call.present(call.z).stride(0), 0 if y is None else y.stride(0)),
            *(job.tokens, job.channels, job.blocks, job.groups),
        ),
        {
            **call.strides,
            "Y_T": 0 if y is None else y.stride(1),
            "ENTERING": entering is not None,
            "BY_ROW": job.whole,
            **call.flags,
            "SKIP": call.D is not None,
            "STORE_Y": y is not None,
            "STORE_CHUNKS": chunk_states is not None,
            "STORE_LEFT": by_segment,
            "STORE_END": last is not None,
            **(job.forward if chunk_states is None else job.backward),
            "maxnreg": job.tuning.registers,
        },
    )


def _costates(call: Call, dy: Tensor) -> Tensor:
    """What each segment's outputs add to the gradient of the state that enters it, (segments, states, dim)."""
    job = call.job
    left = call.states(len(job.segments))
    launch(
        kernels.costate_kernel,
        (job.programs, 1, 1),
        (
            *(call.delta, call.A, call.BC),
            *map(call.present, (call.z, call.bias)),
            *(dy, left, job.segments.on(dy.device)[0]),
        ),
        (
            *(call.delta.stride(0), call.present(call.z).stride(0), dy.stride(0)),
            *(job.tokens, job.channels, job.blocks, job.groups),
        ),
        {
            **{name: call.strides[name] for name in ("DELTA_T", "Z_T", "DIM", "STATES")},
            "DY_T": dy.stride(2),
            **call.flags,
            **job.backward,
        },
    )
    return left


def _recur(call: Call, left: Tensor, total: Tensor, outer: Tensor | None, *, reverse: bool) -> Tensor:
    """What enters each segment, from its row's first (in reverse, its last), (segments, states, dim)."""
    job = call.job
    entering = torch.empty_like(left)
    plane = job.states * job.dim
    launch(
        kernels.recur_kernel,
        (job.batch, -(-plane // RECUR_BLOCK), 1),
        (left, total, call.A, left if outer is None else outer, entering, job.segments.on(left.device)[1]),
        (job.dim, plane),
        {"REVERSE": reverse, "OUTER": outer is not None, "BLOCK": RECUR_BLOCK, "num_warps": 4},
    )
    return entering


def _gradients(
    call: Call, dy: Tensor, chunk_states: Tensor, leaving: Tensor | None, dfirst: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run gradient_kernel and sum its parts."""
    job, device = call.job, dy.device
    shape, count, blocks = (job.batch, job.tokens, job.dim), len(job.segments), job.blocks
    du, ddelta = call.u.new_empty(shape), call.delta.new_empty(shape)
    dz = _empty(call) if call.z is None else call.z.new_empty(shape)
    parts = torch.empty(2, job.batch, job.groups, blocks, job.tokens, job.states, device=device)  # of dB and dC
    dA = call.states(count)
    dD, dbias = (_empty(call) if x is None else torch.empty(count, job.dim, device=device) for x in (call.D, call.bias))
    launch(
        kernels.gradient_kernel,
        (job.programs, 1, 1),
        (
            *(call.u, call.delta, call.A, call.BC),
            *map(call.present, (call.D, call.z, call.bias)),
            *(dy, chunk_states, chunk_states if leaving is None else leaving),
            *(du, ddelta, dz, dA, parts, dD, dbias, dA if dfirst is None else dfirst),
            job.segments.on(device)[0],
        ),
        (
            *(call.u.stride(0), call.delta.stride(0), call.present(call.z).stride(0), dy.stride(0)),
            *(job.tokens, parts.stride(0), job.channels, blocks, job.groups),
        ),
        {
            **call.strides,
            "DY_T": dy.stride(2),
            "LEAVING": leaving is not None,
            "BY_ROW": job.whole,
            "STORE_ENTERING": dfirst is not None,
            **call.flags,
            "SKIP": call.D is not None,
            **job.backward,
            "maxnreg": job.tuning.backward_registers,
        },
    )
    return (
        du.transpose(1, 2),
        ddelta.transpose(1, 2),
        dA.sum(0).T,
        _sum_blocks(parts[0], job.B_groups),
        _sum_blocks(parts[1], job.C_groups),
        dD if call.D is None else dD.sum(0),
        dz if call.z is None else dz.transpose(1, 2),
        dbias if call.bias is None else dbias.sum(0),
    )


def _sum_blocks(parts: Tensor, groups: int) -> Tensor:
    """(batch, groups of channels, blocks, tokens, states) -> (batch, groups, states, tokens)."""
    return parts.unflatten(1, (groups, -1)).sum((2, 3)).transpose(2, 3)


def _gradients_of_nothing(call: Call, initial_state: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
    job, device = call.job, call.u.device

    def zeros(x: Tensor | None, *shape: int) -> Tensor:  # in memory as the kernels would have written them
        if x is None:
            return _empty(call)
        turned = torch.zeros(*shape[:-2], *reversed(shape[-2:]), device=device, dtype=x.dtype)
        return turned.transpose(-1, -len(shape[-2:]))

    shape = (job.batch, job.dim, job.tokens)
    dfirst = zeros(initial_state, job.batch, job.dim, job.states)
    return (
        zeros(call.u, *shape),
        zeros(call.delta, *shape),
        zeros(call.A, job.dim, job.states),
        zeros(call.A, job.batch, job.B_groups, job.states, job.tokens),
        zeros(call.A, job.batch, job.C_groups, job.states, job.tokens),
        zeros(call.D, job.dim),
        zeros(call.z, *shape),
        zeros(call.bias, job.dim),
        dfirst if initial_state is None or dlast is None else dfirst + dlast,
    )


def last_of_nothing(call: Call, initial_state: Tensor | None) -> Tensor:
    """The last state of rows without tokens: their first, or zeros."""
    last = call.states(call.job.batch)
    return (last.zero_() if initial_state is None else last.copy_(initial_state.transpose(1, 2))).transpose(1, 2)


def dense(x: Tensor) -> Tensor:
    """x (..., k, tokens), copied if need be so that neighbours in k are neighbours in memory."""
    return x if x.stride(-2) == 1 or x.shape[-2] == 1 else x.transpose(-1, -2).contiguous().transpose(-1, -2)


def side_by_side(B: Tensor, C: Tensor, groups: int) -> Tensor:
    """B and C as (batch, groups, tokens, 2, states up to a power of two), fp32: small, and read by all of a group."""
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))
    states = B.shape[2]
    whole = triton.next_power_of_2(states)
    shape = (B.shape[0], groups, B.shape[3], 2, whole)
    both = torch.empty(shape, dtype=torch.float32, device=B.device)
    for place, x in enumerate((B, C)):
        own = both[..., place, :states].unflatten(1, (x.shape[1], -1))
        own.copy_(x.transpose(2, 3).unsqueeze(2).expand_as(own))
    if whole > states:
        both[..., states:] = 0.0
    return both


def inside_out(state: Tensor) -> Tensor:
    """(batch, dim, states) -> (batch, states, dim), fp32, in memory."""
    return state.to(torch.float32).transpose(1, 2).contiguous()


def _outside_in(state: Tensor) -> Tensor:
    return state.transpose(1, 2)


def _empty(call: Call) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=call.u.device)


@lru_cache(maxsize=256)  # the layers of a model ask for few, at every step
def _job(batch: int, dim: int, tokens: int, states: int, B_groups: int, C_groups: int) -> Job:
    tuning = tuning_of(states)
    groups = math.lcm(B_groups, C_groups)
    programs = batch * groups * -(-(dim // groups) // tuning.channels)
    chunks = -(-tokens // tuning.tokens)
    per_segment = chunks if programs >= tuning.whole else max(4, chunks * programs // tuning.programs)
    segments = Segments.of(batch, tokens, None, tuning.tokens, max(1, per_segment))
    return Job(
        batch=batch,
        dim=dim,
        tokens=tokens,
        states=states,
        B_groups=B_groups,
        C_groups=C_groups,
        tuning=tuning,
        segments=segments,
    )
