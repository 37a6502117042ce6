"""Time what Python takes to queue ssd_scan and hybrid_mixer, with and without what makes that short; a GPU is needed.

    python benchmarks/ops/bench_host.py

"registered" goes through torch's registration of ops, as torch.compile does; "through Triton" lets Triton look at every
argument of every launch besides, which is what both ops did at first. Milliseconds, medians; the device is busy with
other work meanwhile, as in every timing of transmamba.benchmarking.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from transmamba.benchmarking import OpShape, provenance, time_call
from transmamba.benchmarking.ops import inputs_of
from transmamba.ops import hybrid_mixer, ssd_scan
from transmamba.ops.hybrid_mixer import triton as hybrid
from transmamba.ops.ssd_scan import launches
from transmamba.ops.ssd_scan import triton as scan

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHAPES = "32x2048x8/4x64,8x512x8x64,32x2048x16x128,1x131072x16x128"
SECONDS = 0.3  # of each measurement


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench_host needs a CUDA device.")
    device = torch.device("cuda")
    result = provenance(device, shlex.join(["python", "benchmarks/ops/bench_host.py", *sys.argv[1:]])) | {"rows": []}
    print(result["device"], flush=True)
    for text in options.shapes.split(","):
        inputs = inputs_of(OpShape.parse(text), device)
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        point = inputs["q"].shape[1] // 8
        ops: dict[str, Callable[..., Any]] = {
            "ssd_scan": partial(ssd_scan, *leaves, validate=False),
            f"hybrid_mixer {point}": partial(hybrid_mixer, *leaves, trans_point=point, validate=False),
        }
        dy = torch.randn_like(inputs["q"])
        for name, op in ops.items():
            for way in ("as it is", "registered", "through Triton"):
                with through(way):
                    row = {"shape": text, "op": name, "way": way} | measured(op, leaves, dy, device)
                result["rows"].append(row)
                print("  " + "  ".join(map(str, row.values())), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.name}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


@contextmanager
def through(way: str) -> Iterator[None]:
    with ExitStack() as stack:
        if way != "as it is":
            for module in (hybrid, scan):
                stack.enter_context(patch.object(module, "goes_around_registration", lambda *_: False))
        if way == "through Triton":
            stack.enter_context(patch.object(launches, "launch", launch_through_triton))
        yield


def launch_through_triton(kernel: Any, grid: Any, tensors: Any, numbers: Any, constants: Any) -> None:
    kernel[grid](*tensors, *numbers, **constants)


def measured(
    op: Callable[..., Any], leaves: list[torch.Tensor], dy: torch.Tensor, device: torch.device
) -> dict[str, float]:
    """Host time of forward, and of forward and backward; device time of both."""

    def forward() -> None:
        with torch.no_grad():
            op()

    def both() -> None:
        torch.autograd.grad(op(), leaves, dy)

    first, second = (time_call(call, device, seconds=SECONDS) for call in (forward, both))
    return {"forward_host_ms": first.host, "both_host_ms": second.host, "both_device_ms": second.median}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="batch x tokens x heads x size, commas between")
    parser.add_argument("--name", default="host", help="of the file, before the date")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
