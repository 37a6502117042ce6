"""Times that can be believed: what ran before is out of the caches, and the processor is ahead of the device.

On a CUDA device a call is timed between two events. Events also count the time in which the device waits for Python, so
the device is given other work first, for longer than the call takes to be queued: clearing the cache, which also takes
the call's inputs out of it. The processor's own time for queueing a call stands beside it: a model is as fast as the
slower of the two.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import Any

import torch

from transmamba._version import __version__

Call = Callable[[], Any]

CACHE_BYTES = 2**28  # cleared before each run; five times the cache of an H100 or H200
FEWEST_RUNS = 5
MOST_RUNS = 200
PACKAGES = ("triton", "transformers", "mamba_ssm", "flash-linear-attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Milliseconds of one call. On a CPU, `host` is the processor's time of the process, of all its threads."""

    median: float
    quartiles: tuple[float, float]
    host: float
    runs: int

    @staticmethod
    def of(milliseconds: list[float], host: list[float]) -> "Timing":
        """The summary of several runs."""
        first, median, third = statistics.quantiles(milliseconds, n=4)
        return Timing(
            median=round(median, 4),
            quartiles=(round(first, 4), round(third, 4)),
            host=round(statistics.median(host), 4),
            runs=len(milliseconds),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What this device reaches: bytes read and written by a copy, and operations of a matrix product, a second."""

    copy_bytes: float
    matrix_operations: float

    def floor_ms(self, moved_bytes: float, operations: float) -> tuple[float, float]:
        """The least milliseconds for so many bytes, and for so many operations."""
        return moved_bytes / self.copy_bytes * 1e3, operations / self.matrix_operations * 1e3


def time_call(call: Call, device: torch.device, *, seconds: float = 0.3, warm_ups: int = 2) -> Timing:
    """Return the median and the quartiles of some runs, about `seconds` of them and at least five."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _time_on_cuda(call, device, seconds, warm_ups)
    for _ in range(max(1, warm_ups)):
        call()
    clock: list[float] = []
    busy: list[float] = []
    end = time.perf_counter() + seconds
    while len(clock) < FEWEST_RUNS or (time.perf_counter() < end and len(clock) < MOST_RUNS):
        before, before_busy = time.perf_counter(), time.process_time()
        call()
        _synchronize(device)
        clock.append((time.perf_counter() - before) * 1e3)
        busy.append((time.process_time() - before_busy) * 1e3)
    return Timing.of(clock, busy)


def measure_rates(device: torch.device, *, seconds: float = 0.3) -> Rates:
    """Copy a large tensor, and multiply large random matrices, in bf16 on an accelerator and fp32 on a CPU."""
    large = device.type != "cpu"
    source = torch.randint(127, (2**30 if large else 2**26,), dtype=torch.int8, device=device)
    copied = time_call(partial(torch.empty_like(source).copy_, source), device, seconds=seconds)
    size = 8192 if large else 768
    a, b = (torch.randn(size, size, device=device).to(compute_dtype(device)) for _ in range(2))
    multiplied = time_call(partial(torch.matmul, a, b), device, seconds=seconds)
    return Rates(
        copy_bytes=2 * source.numel() / copied.median * 1e3,
        matrix_operations=2 * size**3 / multiplied.median * 1e3,
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype that benchmarks run in."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """What a number needs to be believed later: command, device, versions, date."""
    # The version of the installed package leaves out the build of torch, such as +cu130.
    here = {"transmamba": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for package in PACKAGES:
        try:
            here[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "load_at_start": round(os.getloadavg()[0], 1) if os.name == "posix" else None,
        "versions": here,
        "dtype": str(compute_dtype(device)).removeprefix("torch."),
        "milliseconds": "median [first quartile, third quartile] of device time, caches cleared before each run; host: "
        "the processor's time to queue a call"
        if device.type == "cuda"
        else "median [first quartile, third quartile]; host: the processor's time, of all threads",
    }


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200", or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _time_on_cuda(call: Call, device: torch.device, seconds: float, warm_ups: int) -> Timing:
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    for _ in range(max(1, warm_ups)):
        call()
    clearing = _between_events(cache.zero_)
    one = max(_between_events(call), 1e-3)
    host: list[float] = []
    for _ in range(FEWEST_RUNS):
        torch.cuda.synchronize(device)
        before = time.perf_counter()
        call()
        host.append((time.perf_counter() - before) * 1e3)
    # So many that the device is still clearing when the call has been queued; the spread of Python's time is large.
    clearings = min(200, ceil(2 * statistics.median(host) / clearing) + 1)
    runs = min(MOST_RUNS, max(FEWEST_RUNS, int(seconds * 1e3 / (one + clearings * clearing))))
    events = []
    for _ in range(runs):
        for _ in range(clearings):
            cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        before = time.perf_counter()
        call()
        host.append((time.perf_counter() - before) * 1e3)
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(device)
    return Timing.of([begin.elapsed_time(end) for begin, end in events], host[-runs:])


def _between_events(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
