"""The search for launch configurations of ssd_scan's kernels: an explicit command, never part of a model's run.

One kernel after the other, in the order of what depends on what; a configuration is taken where it is right at the
shape that is timed and faster than what there was by more than NOISE.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from transmamba.errors import InputError
from transmamba.ops import ssd_scan
from transmamba.ops.backends import resolve_backend
from transmamba.ops.tunings import keep_tuning
from transmamba.progress import progress_bar

from .ops import BOUNDS, Exact, OpShape, inputs_of
from .timing import compute_dtype, device_name, provenance, time_call

NOISE = 0.01  # of a median of some dozen runs

Changes = dict[str, Any]
scan = partial(ssd_scan, validate=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions:
    """shapes: batch x tokens x heads x size, commas between. kernels: which to tune, commas between.

    seconds: of each measurement. keep: write what was found to the user's file, from which it is read ever after.
    """

    shapes: str = "32x2048x16x128,32x2048x32x64"
    kernels: str = "forward,states,sweeps,programs"
    seconds: float = 0.1
    keep: bool = True

    @staticmethod
    def for_device(device: torch.device) -> "TuneOptions":
        """The same for all devices."""
        return TuneOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One configuration. forward, both: medians in milliseconds; None where failure says what was wrong."""

    shape: str
    kernel: str
    configuration: str
    error: float | None = None
    forward: float | None = None
    both: float | None = None
    failure: str = ""

    def time_of(self, kernel: str) -> float:
        """What a choice for this kernel is made by."""
        found = self.forward if kernel == "forward" else self.both
        return float("inf") if self.failure or found is None else found


@dataclass(kw_only=True)
class TuneResult:
    """chosen: for each shape, what differs from the rule. file: where it was kept, or None. failures: of the rule."""

    provenance: dict[str, Any]
    options: TuneOptions
    trials: list[Trial] = field(default_factory=list)
    chosen: dict[str, Changes] = field(default_factory=dict)
    file: str | None = None
    failures: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def tune_ops(
    device: torch.device,
    options: TuneOptions | None = None,
    *,
    command: str = "",
    show: Callable[[str], None] = lambda line: None,
) -> TuneResult:
    """Try launch configurations at these shapes and keep the fastest.

    Raises:
        InputError: a shape or a kernel that is not known, or a device on which our kernels do not run.
    """
    options = TuneOptions() if options is None else options
    shapes = [OpShape.parse(text) for text in options.shapes.split(",") if text]
    kernels = [name for name in options.kernels.split(",") if name]
    unknown = set(kernels) - {"forward", "states", "sweeps", "gradients", "programs"}
    if unknown:
        known = "forward, states, sweeps, gradients and programs"
        raise InputError(f"kernels {', '.join(sorted(unknown))}: choose of {known}.")
    if resolve_backend("ssd_scan", None, torch.empty(0, 64, device=device, dtype=compute_dtype(device))) != "triton":
        raise InputError(f"there is nothing to tune on {device.type}: it runs plain PyTorch. Give a CUDA device.")
    result = TuneResult(provenance=provenance(device, command), options=options)
    for shape in shapes:
        show(shape.name)
        torch.manual_seed(0)
        inputs = inputs_of(shape, device)
        measure = partial(_measured, shape, inputs, Exact(inputs, point=0), options.seconds)
        trials, changes = search(shape, kernels, measure, show)
        result.trials += trials
        if trials[0].failure:
            result.failures.append(f"{shape.name}: {trials[0].failure}")
            continue
        result.chosen[shape.name] = {name: _as_json(value) for name, value in changes.items()}
        if options.keep and changes:
            sizes = {"state_size": shape.size, "head_dim": shape.size, "dtype": str(compute_dtype(device))}
            kept = keep_tuning("ssd_scan", device_name(device), result.chosen[shape.name], **sizes)
            result.file = str(kept)
        del inputs, measure
        torch.cuda.empty_cache()
    return result


def search(
    shape: OpShape,
    kernels: list[str],
    measure: Callable[[str, str, Changes], Trial],
    show: Callable[[str], None] = lambda line: None,
) -> tuple[list[Trial], Changes]:
    """All trials, the rule's first, and what was changed. measure: (kernel, configuration's name, changes) -> Trial."""
    trials = [measure("", "as it is", {})]
    changes: Changes = {}
    best = trials[0]
    _show(trials[0], show)
    if best.failure:
        return trials, changes
    with progress_bar("Tuning", sum(1 for _ in candidates(shape, kernels))) as advance:
        for kernel, name, value in candidates(shape, kernels):
            trial = measure(kernel, name, {**changes, kernel: value})
            trials.append(trial)
            _show(trial, show)
            if trial.time_of(kernel) < (1 - NOISE) * best.time_of(kernel):
                best, changes = trial, {**changes, kernel: value}
            advance(1)
    return trials, changes


def candidates(shape: OpShape, kernels: list[str]) -> Iterator[tuple[str, str, Any]]:
    """(kernel, name, value) of what is worth a trial; half the registers let twice as many programs run at once.

    Narrow tiles of a wide state have read outside the memory, which ends a process: only gradients have square ones.
    """
    from transmamba.ops.ssd_scan.launches import Launch

    for kernel in kernels:
        narrowest = 32 if kernel == "gradients" else min(64, shape.size)
        blocks = [block for block in (128, 64, 32) if narrowest <= block <= max(32, shape.size)]
        if kernel == "programs":
            yield from ((kernel, f"{count} programs", count) for count in (128, 512, 1024))
            continue
        if kernel == "sweeps":
            yield kernel, "none: from stored states", None
        for block in blocks:
            for warps in (4, 8):
                for registers in (None, 128 if warps == 8 else 168):
                    for stages in (1, 2, 3) if registers is None else (1, 2):
                        value = Launch(block=block, warps=warps, stages=stages, registers=registers)
                        limit = "" if registers is None else f", {registers} registers"
                        yield kernel, f"block {block}, {warps} warps, {stages} stages{limit}", value


def _measured(
    shape: OpShape,
    inputs: dict[str, torch.Tensor],
    exact: Exact,
    seconds: float,
    kernel: str,
    name: str,
    changes: Changes,
) -> Trial:
    from transmamba.ops.ssd_scan.launches import configured

    trial = partial(Trial, shape=shape.name, kernel=kernel, configuration=name)
    device = inputs["q"].device
    with configured(**changes):
        try:
            errors = exact.errors_of(scan, inputs)
        except Exception as problem:  # of the compiler, too: that one does not compile is a result
            return trial(failure=(str(problem).strip() or type(problem).__name__).splitlines()[0][:160])
        worst = max(errors, key=errors.__getitem__)
        error = float(f"{errors[worst]:.2g}")
        if not error < BOUNDS[compute_dtype(device)]:
            return trial(error=error, failure=f"{worst} is wrong")
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        dy = torch.randn(exact.weight.shape, device=device, dtype=compute_dtype(device))

        def forward() -> None:
            with torch.no_grad():
                scan(*leaves)

        def both() -> None:
            torch.autograd.grad(scan(*leaves), leaves, dy)

        one, two = (time_call(call, device, seconds=seconds).median for call in (forward, both))
        return trial(error=error, forward=one, both=two)


def _as_json(value: Any) -> Any:
    return value if value is None or isinstance(value, int) else asdict(value)


def _show(trial: Trial, show: Callable[[str], None]) -> None:
    times = trial.failure or f"forward {trial.forward:.3f}  + backward {trial.both:.3f} ms  error {trial.error:.1e}"
    show(f"  {trial.kernel:10s} {trial.configuration:44s} {times}")
