"""Recorded decode steps as a server uses them: warmed up before the first request, and timed at any context.

Generation records and replays steps by itself on CUDA devices (docs/decoding.md); this is for what comes before it.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from transmamba.errors import InputError
from transmamba.models import TransMambaForCausalLM
from transmamba.models.transmamba.decoding import Capture, CudaGraphs, DecodeSession, obstacle, run_eagerly
from transmamba.modules import StaticCache, TransMambaMixer

__all__ = ["StepTiming", "measure_steps", "warm_up"]


@torch.inference_mode(False)
@torch.no_grad()
def warm_up(model: TransMambaForCausalLM, *, batch_sizes: Sequence[int] = (1,), max_length: int) -> int:
    """Record the steps of every phase that rows of one length pass through, and keep them; how many there are.

    Args:
        model: in evaluation mode, with the schedule it will run.
        batch_sizes: that will come; sizes between are rounded up, see docs/decoding.md.
        max_length: tokens of the longest row, its prompt included. Generation with another max_length, rounded, records
            its own steps as they come.

    Raises:
        InputError: steps of this model cannot be recorded, with the reason.
    """
    if max_length < 2 or any(batch < 1 for batch in batch_sizes):
        raise InputError(f"max_length={max_length} and batch_sizes={list(batch_sizes)}: give at least 2, and 1 each.")
    if not model.decoder.wanted_on(model.device):
        raise InputError(f"steps are recorded on CUDA devices, and the model is on {model.device}; move it there.")
    mixers = mixers_of(model)
    recorded = 0
    for batch in batch_sizes:
        reason = obstacle(model, model.model, batch=batch, beams=1)
        if reason:
            raise InputError(f"decode steps of this model cannot be recorded: {reason}.")
        session = model.decoder.session(model.model, model.lm_head, mixers, batch, max_length - 1)
        model.decoder.keep(session)
        holder = session.static.holder()
        if holder is not None:
            holder.leave_static()
        recorded += session.warm_up(session.static.capacity)
    return recorded


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTiming:
    """One decode step of `batch` rows behind `context` tokens each, caches filled with noise.

    step_ms: median [first, third quartile] of replays; loop_ms: of a greedy loop, per token, host and argmax included.
    """

    batch: int
    context: int
    step_ms: float
    quartiles: tuple[float, float]
    loop_ms: float
    cache_bytes: int
    peak_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        """Of the loop, all rows together."""
        return self.batch / self.loop_ms * 1e3


@torch.no_grad()
def measure_steps(
    model: TransMambaForCausalLM, *, batch: int, context: int, steps: int = 32, repeats: int = 3
) -> StepTiming:
    """Time recorded steps at the end of a context, as often as `steps`, in `repeats` rounds; nothing is prefilled."""
    if context <= (steps + 2) * 2 or batch < 1 or steps < 4 or repeats < 1:
        raise InputError(
            f"batch={batch}, context={context}, steps={steps}: give a row or more, 4 steps or more, and a context "
            "above 2 steps + 4."
        )
    device, mixers = model.device, mixers_of(model)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    points = [mixer.trans_point for mixer in mixers]
    configs = [mixer.config for mixer in mixers]
    begin = context - steps - 2
    static = StaticCache(
        configs, points, rows=batch, capacity=context, dtype=model.dtype, device=device, shortest=begin
    )
    fill_with_noise(static)
    capture: Capture = CudaGraphs() if is_cuda else run_eagerly
    session = DecodeSession(model.model, model.lm_head, static, capture)
    tokens = torch.zeros(batch, dtype=torch.int64, device=device)
    times: list[float] = []
    loops: list[float] = []
    for number in range(repeats + 1):
        static.place([begin] * batch)
        for _ in range(2):  # compiled and recorded in the first round
            tokens = session.step(tokens).argmax(dim=-1)
        singles = time_each(session, tokens, steps // 2)
        start = now(device)
        for _ in range(steps - steps // 2):
            tokens = session.step(tokens).argmax(dim=-1)
        loop = (now(device) - start) / (steps - steps // 2) * 1e3
        if number:
            times += singles
            loops.append(loop)
    first, middle, third = statistics.quantiles(times, n=4)
    return StepTiming(
        batch=batch,
        context=context,
        step_ms=middle,
        quartiles=(first, third),
        loop_ms=statistics.median(loops),
        cache_bytes=static.memory_bytes(),
        peak_bytes=torch.cuda.max_memory_allocated(device) if is_cuda else None,
    )


def fill_with_noise(static: StaticCache) -> None:
    """Fill every stored tensor with small random numbers, so that a step reads what it would, and stays finite."""
    for layer in static.layers:
        for x in layer.tensors():
            if x is layer.dt:
                x.uniform_(0.001, 0.1)
            else:
                x.normal_(0.0, 0.1)


def time_each(session: DecodeSession, tokens: Tensor, steps: int) -> list[float]:
    """Milliseconds of each of some steps, on the device where it can tell."""
    device = tokens.device
    if device.type != "cuda":
        found = []
        for _ in range(steps):
            start = time.perf_counter()
            session.step(tokens)
            found.append((time.perf_counter() - start) * 1e3)
        return found
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        session.step(tokens)
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def mixers_of(model: TransMambaForCausalLM) -> list[TransMambaMixer]:
    return model.model._mixers()


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
