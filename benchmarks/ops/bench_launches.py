"""Time launch configurations of ssd_scan's kernels on a GPU, each after it has agreed with fp64 at the same shape.

    python benchmarks/ops/bench_launches.py
    python benchmarks/ops/bench_launches.py --shapes 32x2048x16x128 --only gradients

A configuration changes one kernel; forward and forward with backward are timed as a whole, beside the present table.
What is fastest goes into the table of src/transmamba/ops/ssd_scan/launches.py by hand.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from transmamba.benchmarking import OpShape, provenance, time_call
from transmamba.benchmarking.ops import BOUNDS, Exact, inputs_of
from transmamba.ops import ssd_scan
from transmamba.ops.ssd_scan import launches
from transmamba.ops.ssd_scan.launches import Launch

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHAPES = "32x2048x16x128,32x2048x32x64,1x131072x16x128"
scan = partial(ssd_scan, validate=False)


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench_launches needs a CUDA device.")
    device = torch.device("cuda")
    result = provenance(device, shlex.join(["python", "benchmarks/ops/bench_launches.py", *sys.argv[1:]]))
    result["rows"] = []
    print(f"{result['device']}, triton {result['versions'].get('triton')}", flush=True)
    for text in options.shapes.split(","):
        shape = OpShape.parse(text)
        torch.manual_seed(0)
        inputs = inputs_of(shape, device)
        exact = Exact(inputs, point=0)
        print(shape.name, flush=True)
        for kernel, name, changes in candidates(shape):
            if options.only and kernel not in ("", *options.only.split(",")):
                continue
            row = {"shape": text, "kernel": kernel, "configuration": name} | measured(inputs, exact, changes, options)
            result["rows"].append(row)
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items() if key != "shape"), flush=True)
            options.output.mkdir(parents=True, exist_ok=True)
            path = options.output / f"{options.name}_{result['date']}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def candidates(shape: OpShape) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(kernel, name, changes). Register counts of sm_90, as compiled by Triton 3.6, decided what is worth a trial."""
    yield "", "as in the table", {}
    blocks = [64, 32] if shape.size > 64 else [32]
    for block in blocks:  # half the registers: 16 warps a multiprocessor instead of 8
        for stages in (1, 2):
            launch = Launch(block=block, warps=8, stages=stages, registers=128)
            yield "gradients", f"block {block}, 8 warps, {stages} stages, 128 registers", {"gradients": launch}
    if shape.size <= 64:
        launch = Launch(block=64, warps=4, stages=1, registers=168)
        yield "gradients", "block 64, 4 warps, 168 registers", {"gradients": launch}
        launch = Launch(block=64, warps=8, stages=1, registers=128)
        yield "forward", "block 64, 8 warps, 128 registers", {"forward": launch}
    for stages in (1, 2):
        launch = Launch(block=64, warps=4, stages=stages, registers=168)
        yield "forward", f"block 64, 4 warps, {stages} stages, 168 registers", {"forward": launch}
    if shape.size > 64:
        yield "states", "block 128, 8 warps, 3 stages", {"states": Launch(block=128, warps=8, stages=3)}
    for programs in (128, 512, 1024):
        yield "programs", f"{programs} programs", {"programs": programs}


def measured(
    inputs: dict[str, torch.Tensor], exact: Exact, changes: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    device = inputs["q"].device
    with launches.configured(**changes):
        try:
            errors = exact.errors_of(scan, inputs)
        except Exception as error:  # of the compiler, too: what does not compile is a result
            return {"failure": str(error).strip().splitlines()[0][:160]}
        worst = max(errors, key=errors.__getitem__)
        found: dict[str, Any] = {"error": float(f"{errors[worst]:.2g}")}
        if not errors[worst] < BOUNDS[torch.bfloat16]:
            return found | {"failure": f"{worst} is wrong"}
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        dy = torch.randn(exact.weight.shape, device=device, dtype=torch.bfloat16)

        def forward() -> None:
            with torch.no_grad():
                scan(*leaves)

        def both() -> None:
            torch.autograd.grad(scan(*leaves), leaves, dy)

        for key, call in (("forward", forward), ("both", both)):
            timing = time_call(call, device, seconds=options.seconds)
            found |= {f"{key}_ms": timing.median, f"{key}_quartiles": timing.quartiles}
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="batch x tokens x heads x size, commas between")
    parser.add_argument("--only", default="", help="kernels: gradients, forward, states, programs; default: all")
    parser.add_argument("--seconds", type=float, default=0.1, help="of each measurement")
    parser.add_argument("--name", default="ssd_launches", help="of the file, before the date")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
