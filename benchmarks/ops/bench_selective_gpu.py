"""Time the kernels of selective_scan and logit_distillation on a GPU, after they have agreed with fp64.

    python benchmarks/ops/bench_selective_gpu.py
    python benchmarks/ops/bench_selective_gpu.py --ops selective_scan --whole 1,1000000 --slow

whole: with how many programs rows stay whole, each in the place of the default: 1 never cuts them, 1000000 always does.
Beside each time stands its floor: the bytes that have to move over the copy bandwidth of this card. Medians and
quartiles go to the terminal, and with device, versions and command to benchmarks/results/.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from bench_ssd_gpu import BOUND, RESULTS, copy_bandwidth, pair, provenance, timed, values_and_gradients
from torch import Tensor

from transmamba.ops import selective_scan
from transmamba.ops.logit_distillation import logit_gradient

# batch, channels, tokens, states
SCANS = {
    "64 pixels": (128, 384, 65, 16),
    "vim-tiny": (128, 384, 197, 16),
    "videomamba": (16, 768, 1568, 16),
    "long": (1, 1536, 65_536, 16),
}
LOGITS = {"32k": (8192, 32_000), "151k": (2048, 151_936)}  # rows, vocabulary
Row = dict[str, Any]


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench_selective_gpu needs a CUDA device; bench_selective_scan.py measures CPUs.")
    torch.manual_seed(0)
    result = provenance() | {"benchmark": "ops/bench_selective_gpu", "copy_tb_s": copy_bandwidth(), "rows": []}
    print("{device}: copies at {copy_tb_s:.2f} TB/s".format(**result))
    measure = {"selective_scan": scans, "logit_distillation": logits}
    for op in options.ops:
        for row, moved, call in measure[op](options):
            row |= timed(call) | {"op": op, "floor_ms": round(moved / result["copy_tb_s"] * 1e-9, 4)}
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


def scans(options: argparse.Namespace) -> list[tuple[Row, float, Callable[[], Any]]]:
    """Rows to fill, the bytes that have to move, and what to time."""
    found = []
    launches = import_module("transmamba.ops.selective_scan.launches")
    tuning_of = launches.tuning_of
    for whole in options.whole:
        if whole is not None:
            launches.tuning_of = lambda size, whole=whole: replace(tuning_of(size), whole=whole)
            launches._job.cache_clear()
        scan = partial(selective_scan, delta_softplus=True, backend="triton")
        check_scan(scan)
        for name, shape in SCANS.items():
            inputs = scan_inputs(*shape)
            dy = torch.randn_like(inputs["u"])
            calls = [pair("triton", named(scan), inputs, dy)]
            if whole is None and options.slow and shape[2] < 10_000:
                calls.append(pair("torch", named(partial(scan, backend="torch")), inputs, dy))
            if whole is None and find_spec("mamba_ssm"):
                from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

                rows = inputs | {key: inputs[key].contiguous() for key in ("u", "delta", "z", "B", "C")}
                calls.append(pair("mamba_ssm", named(partial(selective_scan_fn, delta_softplus=True)), rows, dy))
            entries = shape[0] * shape[1] * shape[2]
            for what, forward, both in calls:
                for passes, call, size in (("forward", forward, 8), ("both", both, 22)):
                    row = {"shape": name, "sizes": shape, "what": f"{what} whole={whole}", "pass": passes}
                    if whole is None:
                        found.append((row, entries * size, call))
                    else:  # now, while this configuration is set
                        found.append((row, entries * size, partial(cut, launches, tuning_of, whole, call)))
        launches.tuning_of = tuning_of
        launches._job.cache_clear()
    return found


def cut(launches: Any, tuning_of: Callable[[int], Any], whole: int, call: Callable[[], Any]) -> None:
    """Run a call in a configuration; finding the job again costs no time on the device."""
    launches.tuning_of = lambda size: replace(tuning_of(size), whole=whole)
    launches._job.cache_clear()
    call()
    launches.tuning_of = tuning_of
    launches._job.cache_clear()


def named(scan: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*given: Tensor) -> Tensor:
        u, delta, A, B, C, D, z, delta_bias = given
        return scan(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias)

    return run


def scan_inputs(batch: int, dim: int, tokens: int, states: int) -> dict[str, Tensor]:
    """As projections leave them: channels stand last in memory."""

    def last(count: int) -> Tensor:
        return torch.randn(batch, tokens, count, device="cuda").bfloat16().transpose(1, 2)

    return {
        "u": last(dim),
        "delta": last(dim) - 2,
        "A": -torch.randn(dim, states, device="cuda").exp(),
        "B": last(states),
        "C": last(states),
        "D": torch.randn(dim, device="cuda"),
        "z": last(dim),
        "delta_bias": torch.randn(dim, device="cuda"),
    }


def check_scan(scan: Callable[..., Tensor]) -> None:
    inputs = scan_inputs(2, 96, 300, 16)
    weight = torch.randn_like(inputs["u"])
    found = values_and_gradients(scan, inputs, weight)
    double = {name: x.double() for name, x in inputs.items()}
    exact = values_and_gradients(partial(scan, backend="torch"), double, weight.double())
    refuse("selective_scan", found, exact)


def logits(options: argparse.Namespace) -> list[tuple[Row, float, Callable[[], Any]]]:
    found = []
    weights = (2.0, 0.7, 0.3)
    for name, (rows, size) in LOGITS.items():
        student, teacher = (torch.randn(rows, size, device="cuda").bfloat16() for _ in range(2))
        labels = torch.randint(size, (rows,), device="cuda")
        few = (student[:16], labels[:16], teacher[:16])
        exact = logit_gradient(few[0].double(), few[1], few[2].double(), *weights, backend="torch")
        refuse("logit_distillation", logit_gradient(*few, *weights, backend="triton"), exact)
        for backend in ("triton", "torch") if options.slow else ("triton",):
            for what, given, each in (("kl and ce", teacher, 6), ("ce", None, 4)):
                row = {"shape": name, "sizes": (rows, size), "what": f"{backend} {what}", "pass": "gradient"}
                call = partial(logit_gradient, student, labels, given, *weights, backend=backend)
                found.append((row, float(rows) * size * each, call))
    return found


def refuse(op: str, found: Any, exact: Any) -> None:
    """Stop where an error is larger than 16 bits explain: nothing wrong is timed."""
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    if not max(errors) < BOUND:
        sys.exit(f"{op} differs from fp64 by {errors}, more than {BOUND:.2g}; nothing is timed.")


if __name__ == "__main__":
    main()
