"""Time every op's plain PyTorch form on this device, after it has agreed with the reference; for choosing chunk sizes.

    python benchmarks/ops/bench_ops.py
    python benchmarks/ops/bench_ops.py --ops ssd_scan --chunk-sizes 16,32,64,128,256 --threads 2

`transmamba bench ops` compares the fastest form here with others; this script has every op, and each chunk size. The
processor's time stands beside the clock's: on a busy machine it is the steadier of the two.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from transmamba.benchmarking import provenance, time_call
from transmamba.ops import causal_conv1d, hybrid_mixer, memory_converter, softmax_attention, ssd_scan, ssd_step
from transmamba.ops.ssd_scan import ssd_scan_torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
GATE_BOUND = 1e-4  # fp32 against the fp64 reference: dozens of roundings of 2^-24, and far below any wrong formula
GATE_LENGTH = 150

Inputs = dict[str, Tensor]
Call = Callable[..., Any]

# batch, seq_len, heads of (q, k, v, dt), state_size, head_dim
Shape = tuple[int, int, tuple[int, int, int, int], int, int]
SHAPES: dict[str, Shape] = {
    "training, small": (8, 512, (4, 4, 4, 4), 32, 32),
    "training, grouped-query": (4, 1024, (8, 2, 2, 8), 64, 64),
    "long, one row": (1, 4096, (12, 12, 12, 12), 64, 64),
    "mamba2, one group": (1, 4096, (1, 1, 24, 24), 128, 64),
}


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    command = shlex.join(["python", "benchmarks/ops/bench_ops.py", *sys.argv[1:]])
    result = provenance(device, command) | {"dtype": "float32", "error": {}, "rows": []}
    ops = calls()
    for op in options.ops:
        error = disagreement(ops[op], device)
        if not error < GATE_BOUND:
            sys.exit(f"{op}: differs from the reference by {error:.2g}, more than {GATE_BOUND:.0g}; nothing is timed.")
        result["error"][op] = float(f"{error:.2g}")
        print(f"{op}: agrees with the reference to {error:.1e}")
        for name, shape in SHAPES.items():
            for label, call in variants(op, ops[op], options.chunk_sizes):
                for backward in (False, True):
                    row = {"op": op, "shape": name, "variant": label, "pass": "both" if backward else "forward"}
                    inputs = inputs_of(shape if op != "ssd_step" else (shape[0], 1, *shape[2:]), device)
                    row |= timed(call, inputs, backward, device, options.seconds)
                    result["rows"].append(row)
                    print(
                        "  {shape:26s} {variant:14s} {pass:8s} {median:9.2f} {quartiles}   host {host:9.2f}".format(
                            **row
                        )
                    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name or 'ops'}_{device.type}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 = torch's default")
    parser.add_argument("--ops", type=lambda text: text.split(","), default=list(calls()))
    parser.add_argument("--chunk-sizes", type=lambda text: [int(n) for n in text.split(",")], default=[])
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring per row, at least five runs")
    parser.add_argument("--name", help="of the file in benchmarks/results, before device and date")
    return parser.parse_args()


def calls() -> dict[str, Call]:
    """Each op as a function of the scan's inputs, its TransPoint in the middle."""

    def step(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, state: Tensor, **options: Any) -> Any:
        return ssd_step(state, *(x[:, 0] for x in (q, k, v, dt)), A, **options)

    def convert(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, state: Tensor, **options: Any) -> Any:
        return memory_converter(k, v, dt, A, **options)

    def attend(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, state: Tensor, **options: Any) -> Any:
        return softmax_attention(q, k, v, **options)

    def convolve(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, state: Tensor, **options: Any) -> Any:
        x = v.flatten(2)
        return causal_conv1d(x, x[0, :4].T.contiguous(), activation="silu", **options)

    def mix(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, state: Tensor, **options: Any) -> Any:
        return hybrid_mixer(q, k, v, dt, A, trans_point=q.shape[1] // 2, **options)

    def scan(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, state: Tensor, **options: Any) -> Any:
        return ssd_scan(q, k, v, dt, A, **options)

    return {
        "ssd_scan": scan,
        "ssd_step": step,
        "memory_converter": convert,
        "hybrid_mixer": mix,
        "softmax_attention": attend,
        "causal_conv1d": convolve,
    }


def variants(op: str, call: Call, chunk_sizes: list[int]) -> list[tuple[str, Call]]:
    """The op as it is called; for ssd_scan also with each chunk size."""
    found: list[tuple[str, Call]] = [("default", partial(call, validate=False))]
    if op == "ssd_scan":
        found += [(f"chunk_size {size}", partial(_scan_in_chunks, chunk_size=size)) for size in chunk_sizes]
    return found


def _scan_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, state: Tensor, *, chunk_size: int
) -> Tensor:
    return ssd_scan_torch(q, k, v, dt, A, chunk_size=chunk_size)[0]


def inputs_of(shape: Shape, device: torch.device) -> Inputs:
    batch, seq_len, (q, k, v, dt), state_size, head_dim = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    inputs = {
        "q": normal(batch, seq_len, q, state_size) / state_size**0.5,
        "k": normal(batch, seq_len, k, state_size),
        "v": normal(batch, seq_len, v, head_dim),
        "dt": softplus(normal(batch, seq_len, dt) - 2),
        "A": -torch.exp(normal(dt)),
        "state": normal(batch, max(k, v, dt), state_size, head_dim),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def disagreement(call: Call, device: torch.device) -> float:
    """The largest relative RMS error of the torch backend in fp32, over shapes and values and gradients."""
    worst = 0.0
    for batch, _, heads, state_size, head_dim in SHAPES.values():
        inputs = inputs_of((batch, GATE_LENGTH, heads, state_size // 4, head_dim // 4), device)
        exact = outputs_and_gradients(partial(call, backend="reference"), {n: x.double() for n, x in inputs.items()})
        found = outputs_and_gradients(partial(call, backend="torch"), inputs)
        for a, b in zip(found, exact, strict=True):
            error = ((a.double() - b).square().mean() / b.square().mean().clamp_min(1e-300)).sqrt().item()
            worst = error if error != error else max(worst, error)
    return worst


def outputs_and_gradients(call: Call, inputs: Inputs) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = call(**leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    loss = sum(y.square().sum() for y in outputs)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return [*outputs, *(x for x in found if x is not None)]


def timed(call: Call, inputs: Inputs, backward: bool, device: torch.device, seconds: float) -> dict[str, Any]:
    def once() -> None:
        if backward:
            outputs_and_gradients(call, inputs)
        else:
            with torch.no_grad():
                call(**inputs)

    return asdict(time_call(once, device, seconds=seconds))


if __name__ == "__main__":
    main()
