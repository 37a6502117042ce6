"""Time the kernels of selective_scan and logit_distillation on a GPU, after they have agreed with fp64.

    python benchmarks/ops/bench_selective_gpu.py
    python benchmarks/ops/bench_selective_gpu.py --ops selective_scan --whole 1,1000000 --slow

whole: with how many programs rows stay whole, each in the place of the default: 1 never cuts them, 1000000 always does.
Beside each time stands its floor: the bytes that have to move over the copy bandwidth of this card. Medians and
quartiles go to the terminal, and with device, versions and command to benchmarks/results/.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from bench_ops import RESULTS, outputs_and_gradients
from torch import Tensor

from transmamba.benchmarking import measure_rates, provenance, time_call
from transmamba.benchmarking.ops import BOUNDS
from transmamba.ops import selective_scan
from transmamba.ops.logit_distillation import logit_gradient

DEVICE = torch.device("cuda")
BOUND = BOUNDS[torch.bfloat16]
# batch, channels, tokens, states
SCANS = {
    "64 pixels": (128, 384, 65, 16),
    "vim-tiny": (128, 384, 197, 16),
    "videomamba": (16, 768, 1568, 16),
    "long": (1, 1536, 65_536, 16),
}
LOGITS = {"32k": (8192, 32_000), "151k": (2048, 151_936)}  # rows, vocabulary
Row = dict[str, Any]
Measured = Iterator[tuple[Row, float, Callable[[], Any]]]  # a row to fill, the bytes that have to move, what to time


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench_selective_gpu needs a CUDA device; bench_selective_scan.py measures CPUs.")
    torch.manual_seed(0)
    result = provenance(DEVICE, shlex.join(["python", "benchmarks/ops/bench_selective_gpu.py", *sys.argv[1:]]))
    rates = measure_rates(DEVICE)
    result |= {"copy_tb_s": round(rates.copy_bytes * 1e-12, 3), "rows": []}
    print("{device}: copies at {copy_tb_s:.2f} TB/s".format(**result))
    measure = {"selective_scan": scans, "logit_distillation": logits}
    for op in options.ops:
        for row, moved, call in measure[op](options):
            floor, _ = rates.floor_ms(moved, 0)
            row |= asdict(time_call(call, DEVICE)) | {"op": op, "floor_ms": round(floor, 4)}
            result["rows"].append(row)
            print(
                "  {shape:12s} {what:22s} {pass:8s} {median:8.3f} ms  {quartiles}  floor {floor_ms:.3f}".format(**row)
            )
    path = RESULTS / f"{options.name}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", type=lambda text: text.split(","), default=["selective_scan", "logit_distillation"])
    parser.add_argument("--whole", type=lambda text: [int(n) for n in text.split(",")], default=[None])
    parser.add_argument("--slow", action="store_true", help="time our torch backends too")
    parser.add_argument("--name", default="selective_gpu", help="of the file in benchmarks/results, before the date")
    return parser.parse_args()


def scans(options: argparse.Namespace) -> Measured:
    scan = partial(selective_scan, delta_softplus=True, backend="triton")
    for whole in options.whole:
        with rows_whole_from(whole):
            check_scan(scan)
            for name, shape in SCANS.items():
                inputs = scan_inputs(*shape)
                dy = torch.randn_like(inputs["u"])
                entries = inputs["u"].numel()
                for what, op, given in scans_of(scan, inputs, options.slow and shape[2] < 10_000, whole is None):
                    row = {"shape": name, "sizes": shape, "what": f"{what} whole={whole}"}
                    yield row | {"pass": "forward"}, 8.0 * entries, partial(forward, op, given)
                    yield row | {"pass": "both"}, 22.0 * entries, partial(both, op, given, dy)


def scans_of(
    scan: Callable[..., Tensor], inputs: dict[str, Tensor], slow: bool, peers: bool
) -> Iterator[tuple[str, Callable[..., Tensor], dict[str, Tensor]]]:
    """Our kernels, and what stands beside them once."""
    yield "triton", scan, inputs
    if peers and slow:
        yield "torch", partial(scan, backend="torch"), inputs
    if peers and find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        rows = {name: inputs[name].contiguous() for name in ("u", "delta", "z", "B", "C")}
        yield "mamba_ssm", partial(selective_scan_fn, delta_softplus=True), inputs | rows


@contextmanager
def rows_whole_from(programs: int | None) -> Iterator[None]:
    """Launch with another number of programs from which rows stay whole; None leaves the table's."""
    launches = import_module("transmamba.ops.selective_scan.launches")
    tuning_of = launches.tuning_of

    def changed(state_size: int) -> Any:
        return tuning_of(state_size) if programs is None else replace(tuning_of(state_size), whole=programs)

    with patch.object(launches, "tuning_of", changed):
        launches._job.cache_clear()
        yield
    launches._job.cache_clear()


def forward(op: Callable[..., Tensor], inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        op(**inputs)


def both(op: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor) -> None:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    torch.autograd.grad(op(**leaves), list(leaves.values()), dy)


def scan_inputs(batch: int, dim: int, tokens: int, states: int) -> dict[str, Tensor]:
    """As projections leave them: channels stand last in memory."""

    def last(count: int) -> Tensor:
        return torch.randn(batch, tokens, count, device=DEVICE).bfloat16().transpose(1, 2)

    return {
        "u": last(dim),
        "delta": last(dim) - 2,
        "A": -torch.randn(dim, states, device=DEVICE).exp(),
        "B": last(states),
        "C": last(states),
        "D": torch.randn(dim, device=DEVICE),
        "z": last(dim),
        "delta_bias": torch.randn(dim, device=DEVICE),
    }


def check_scan(scan: Callable[..., Tensor]) -> None:
    inputs = scan_inputs(2, 96, 300, 16)
    exact = outputs_and_gradients(partial(scan, backend="torch"), {name: x.double() for name, x in inputs.items()})
    refuse("selective_scan", outputs_and_gradients(scan, inputs), exact)


def logits(options: argparse.Namespace) -> Measured:
    weights = (2.0, 0.7, 0.3)
    for name, (rows, size) in LOGITS.items():
        student, teacher = (torch.randn(rows, size, device=DEVICE).bfloat16() for _ in range(2))
        labels = torch.randint(size, (rows,), device=DEVICE)
        few = (student[:16], labels[:16], teacher[:16])
        exact = logit_gradient(few[0].double(), few[1], few[2].double(), *weights, backend="torch")
        refuse("logit_distillation", logit_gradient(*few, *weights, backend="triton"), exact)
        for backend in ("triton", "torch") if options.slow else ("triton",):
            for what, given, each in (("kl and ce", teacher, 6), ("ce", None, 4)):
                row = {"shape": name, "sizes": (rows, size), "what": f"{backend} {what}", "pass": "gradient"}
                call = partial(logit_gradient, student, labels, given, *weights, backend=backend)
                yield row, float(rows) * size * each, call


def refuse(op: str, found: Any, exact: Any) -> None:
    """Stop where an error is larger than 16 bits explain: nothing wrong is timed."""
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    if not max(errors) < BOUND:
        sys.exit(f"{op} differs from fp64 by {errors}, more than {BOUND:.2g}; nothing is timed.")


if __name__ == "__main__":
    main()
