"""Time selective_scan's torch backend at the sizes of vision backbones, after it has agreed with the reference.

    python benchmarks/ops/bench_selective_scan.py --threads 1
    python benchmarks/ops/bench_selective_scan.py --threads 1 --numbers 14,16,18,20,22

numbers: of states in a chunk, as powers of two; each is timed in the place of the default.
Medians and spread (the quartiles) go to the terminal, and with device, versions and command to benchmarks/results/.
"""

import argparse
import json
import shlex
import sys

import torch
from bench_ops import GATE_BOUND, RESULTS, Inputs, outputs_and_gradients, timed
from torch import Tensor

from transmamba.benchmarking import provenance
from transmamba.ops import selective_scan
from transmamba.ops.selective_scan import selective_scan_torch

GATE = (2, 24, 150, 4)
# batch, channels, seq_len, state_size: a layer and direction of PlainMamba-tiny or ViM-tiny, and the last of VMamba-T
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "192 wide, 14 x 14, one image": (1, 384, 196, 16),
    "192 wide, 14 x 14": (8, 384, 196, 16),
    "192 wide, 8 x 8": (16, 384, 64, 16),
    "192 wide, 78 x 78, one image": (1, 384, 6084, 16),
    "768 wide, 7 x 7, one state": (16, 768, 49, 1),
}


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    error = disagreement(device)
    if not error < GATE_BOUND:
        sys.exit(f"selective_scan differs from the reference by {error:.2g}, more than {GATE_BOUND:.0g}.")
    command = shlex.join(["python", "benchmarks/ops/bench_selective_scan.py", *sys.argv[1:]])
    result = provenance(device, command) | {"dtype": "float32", "error": float(f"{error:.2g}"), "rows": []}
    implementation = sys.modules[selective_scan_torch.__module__]
    for power in options.numbers or [None]:
        if power is not None:
            implementation.CHUNK_NUMBERS[device.type] = 1 << power  # type: ignore[attr-defined]
        for name, shape in SHAPES.items():
            for backward in (False, True):
                row = {"shape": name, "numbers": power, "pass": "both" if backward else "forward"}
                row |= timed(scan, inputs_of(shape, device), backward, device, options.seconds)
                result["rows"].append(row)
                print("{shape:30s} {numbers!s:8s} {pass:8s} {median:9.2f} {quartiles}   host {host:9.2f}".format(**row))
    path = RESULTS / f"{options.name}_{device.type}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 = torch's default")
    parser.add_argument("--numbers", type=lambda text: [int(n) for n in text.split(",")], default=[])
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring per row, at least five runs")
    parser.add_argument("--name", default="selective_scan", help="of the file in benchmarks/results")
    return parser.parse_args()


def scan(backend: str | None = None, **inputs: Tensor) -> Tensor:
    return selective_scan(**inputs, delta_softplus=True, validate=False, backend=backend)


def inputs_of(shape: tuple[int, int, int, int], device: torch.device) -> Inputs:
    batch, channels, seq_len, state_size = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device)

    return {
        "u": normal(batch, channels, seq_len),
        "delta": normal(batch, channels, seq_len) - 2,
        "A": -normal(channels, state_size).exp(),
        "B": normal(batch, state_size, seq_len),
        "C": normal(batch, state_size, seq_len),
        "D": normal(channels),
        "delta_bias": normal(channels),
    }


def disagreement(device: torch.device) -> float:
    """The largest relative RMS error in fp32, over values and gradients."""
    inputs = inputs_of(GATE, device)
    found = outputs_and_gradients(scan, inputs)
    exact = outputs_and_gradients(
        lambda **exact: scan(**exact, backend="reference"), {name: x.double() for name, x in inputs.items()}
    )
    errors = [
        ((a.double() - b).square().mean() / b.square().mean()).sqrt().item() for a, b in zip(found, exact, strict=True)
    ]
    return float("nan") if any(error != error for error in errors) else max(errors)


if __name__ == "__main__":
    main()
