"""Time ssd_scan, memory_converter and hybrid_mixer on a GPU, after they have agreed with fp64 at the same sizes.

    python benchmarks/ops/bench_ssd_gpu.py
    python benchmarks/ops/bench_ssd_gpu.py --shapes 16x128,32x64 --name ssd_h200

Beside our Triton backend stand our torch backend, torch's attention, mamba_ssm and fla where they are installed, and
two floors: the bytes that have to move over the copy bandwidth of this card, and the operations over its matrix rate.
Medians and quartiles go to the terminal, and with device, versions and command to benchmarks/results/.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, softplus

from transmamba.ops import hybrid_mixer, memory_converter, ssd_scan

RESULTS = Path(__file__).resolve().parents[1] / "results"
BOUND = 3 * 2**-8  # bf16 rounds each term a few times, by 2^-9 on average; wrong formulas are off by tenths
CHECKED_LENGTH = 700

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """What one row of the table is measured at; state_size = head_dim = size."""

    batch: int
    seq_len: int
    q_heads: int
    kv_heads: int
    size: int


SHAPES = {
    "31m": Shape(32, 2048, 8, 4, 64),
    "16x128": Shape(32, 2048, 16, 16, 128),
    "16x128 T=32768": Shape(2, 32_768, 16, 16, 128),
    "16x128 T=131072": Shape(1, 131_072, 16, 16, 128),
    "32x64": Shape(32, 2048, 32, 32, 64),
    "32x64 T=32768": Shape(2, 32_768, 32, 32, 64),
}


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("bench_ssd_gpu needs a CUDA device; bench_ops.py measures CPUs.")
    torch.manual_seed(0)
    result = provenance() | {"copy_tb_s": copy_bandwidth(), "matrix_tflop_s": matrix_rate(), "error": {}, "rows": []}
    print("{device}: copies at {copy_tb_s:.2f} TB/s, products at {matrix_tflop_s:.0f} TFLOP/s".format(**result))
    for name in options.shapes:
        shape = SHAPES[name]
        errors = disagreement(shape)
        worst = max(errors.values())
        if not worst < BOUND:
            sys.exit(f"{name}: differs from fp64 by {errors}, more than {BOUND:.2g}; nothing is timed.")
        result["error"][name] = errors
        print(f"{name}: agrees with fp64 to {worst:.1e}")
        floors = floors_of(shape, result["copy_tb_s"], result["matrix_tflop_s"])
        for what, call, gradients in measured(shape, slow=options.slow):
            for passes, run in (("forward", call), ("both", gradients)):
                if run is None:
                    continue
                row = {"shape": name, **asdict(shape), "what": what, "pass": passes} | timed(run) | floors[passes]
                result["rows"].append(row)
                print(
                    "  {what:26s} {pass:8s} {median:8.3f} ms  {quartiles}   floors {memory_ms:.2f} (memory) "
                    "{matrix_ms:.2f} (matrix)".format(**row)
                )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument("--slow", action="store_true", help="time our torch backend too, which takes tens of ms a call")
    parser.add_argument("--name", default="ssd_gpu", help="of the file in benchmarks/results, before the date")
    return parser.parse_args()


def provenance() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: __import__(name).__version__ for name in ("triton", "mamba_ssm", "fla") if find_spec(name)}
    return {
        "benchmark": "ops/bench_ssd_gpu",
        "command": f"python {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "dtype": "bfloat16",
        "milliseconds": "median [first quartile, third quartile] of device time between events, L2 cleared before each",
    }


def inputs_of(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """q, k, v as views of one projection; heads that remember from a few tokens to thousands."""
    heads = (shape.q_heads, shape.kv_heads, shape.kv_heads)
    widths = [count * shape.size for count in heads]
    qkv = torch.randn(shape.batch, shape.seq_len, sum(widths), device="cuda").mul_(shape.size**-0.25).to(dtype)
    q, k, v = (x.unflatten(-1, (-1, shape.size)) for x in qkv.split(widths, dim=-1))
    dt = softplus(torch.randn(shape.batch, shape.seq_len, shape.q_heads, device="cuda") - 3)
    A = -torch.logspace(-2, 1, shape.q_heads, device="cuda")
    D = torch.randn(shape.q_heads, device="cuda")
    return {"q": q, "k": k, "v": v, "dt": dt, "A": A, "D": D}


def disagreement(shape: Shape) -> dict[str, float]:
    """Relative RMS errors of y and of every gradient against our torch backend in fp64, on a part of the tokens."""
    inputs = inputs_of(Shape(2, CHECKED_LENGTH, shape.q_heads, shape.kv_heads, shape.size))
    weight = torch.randn(2, CHECKED_LENGTH, shape.q_heads, shape.size, device="cuda").bfloat16()
    found = values_and_gradients(partial(ssd_scan, backend="triton"), inputs, weight)
    double = {name: x.double() for name, x in inputs.items()}
    exact = values_and_gradients(partial(ssd_scan, backend="torch"), double, weight.double())
    return {
        name: float(f"{((a.double() - b).norm() / b.norm()).item():.2g}")
        for name, a, b in zip(("y", *inputs), found, exact, strict=True)
    }


def values_and_gradients(call: Callable[..., Tensor], inputs: dict[str, Tensor], weight: Tensor) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = call(**leaves)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), weight)]


def measured(shape: Shape, *, slow: bool) -> list[tuple[str, Call, Call | None]]:
    """(what, a forward call, a call with backward or None) for everything that can run here."""
    inputs = inputs_of(shape)
    q, k, v, dt, A, _ = inputs.values()
    dy = torch.randn(*q.shape[:3], shape.size, device="cuda").bfloat16()
    found = [pair("ssd_scan triton", lambda q, k, v, dt, A, D: ssd_scan(q, k, v, dt, A, D), inputs, dy)]
    found.append(("memory_converter triton", partial(without_gradients, memory_converter, k, v, dt, A), None))
    for point in (shape.seq_len // 64, shape.seq_len // 8, shape.seq_len // 2):

        def mix(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor, point: int = point) -> Tensor:
            return hybrid_mixer(q, k, v, dt, A, D, trans_point=point)

        found.append(pair(f"hybrid_mixer triton {point}", mix, inputs, dy))
    if slow:
        found.append(pair("ssd_scan torch", partial(ssd_scan, backend="torch"), inputs, dy))
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

        def attend(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                grouped = q.shape[2] != k.shape[2]
                return scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=grouped
                ).transpose(1, 2)

        found.append(pair(f"attention {name}", attend, {"q": q, "k": k, "v": v}, dy))
    found += peers(shape, inputs, dy)
    return found


def peers(shape: Shape, inputs: dict[str, Tensor], dy: Tensor) -> list[tuple[str, Call, Call | None]]:
    """The same scan by other libraries, where they are installed; they have as many heads everywhere."""
    if shape.q_heads != shape.kv_heads:
        return []
    found = []
    if find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        def mamba(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
            return mamba_chunk_scan_combined(v, dt, A, k, q, chunk_size=128, D=D)

        found.append(pair("mamba_ssm", mamba, inputs, dy))
    if find_spec("fla"):
        from fla.ops.simple_gla import chunk_simple_gla

        def gla(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor) -> Tensor:
            return chunk_simple_gla(q, k, v * dt[..., None].to(v.dtype), dt * A, scale=1.0)[0]

        found.append(pair("fla simple_gla", gla, {name: x for name, x in inputs.items() if name != "D"}, dy))
    return found


def pair(
    what: str, call: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor
) -> tuple[str, Call, Call | None]:
    leaves = [x.detach().requires_grad_() for x in inputs.values()]

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, dy, allow_unused=True)

    return what, partial(without_gradients, call, *inputs.values()), both


def without_gradients(call: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return call(*inputs)


def timed(call: Call, *, runs: int = 30) -> dict[str, Any]:
    """Median and quartiles of device time, with the caches cleared before each run."""
    cache = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    events = []
    for _ in range(runs):
        cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in events]
    quartiles = statistics.quantiles(times, n=4)
    return {
        "median": round(statistics.median(times), 4),
        "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "runs": runs,
    }


def floors_of(shape: Shape, copy_tb_s: float, matrix_tflop_s: float) -> dict[str, dict[str, float]]:
    """The least times of the scan: every input and output moved once; the products of chunks of 64 tokens."""
    tokens = shape.batch * shape.seq_len
    wide, narrow = (2 * tokens * heads * shape.size for heads in (shape.q_heads, shape.kv_heads))
    moved = {"forward": 2 * wide + 2 * narrow, "both": 5 * wide + 6 * narrow}
    pair_products, state_products = 2 * 64 * shape.size, 2 * shape.size**2  # operations per token and head, each
    products = {"forward": 2 * pair_products + 2 * state_products, "both": 7 * pair_products + 7 * state_products}
    return {
        passes: {
            "memory_ms": round(moved[passes] / copy_tb_s * 1e-9, 4),
            "matrix_ms": round(products[passes] * tokens * shape.q_heads / matrix_tflop_s * 1e-9, 4),
        }
        for passes in moved
    }


def copy_bandwidth() -> float:
    """TB/s of a device-to-device copy, bytes read plus bytes written."""
    source = torch.randint(127, (2**30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return round(2 * source.numel() / timed(lambda: target.copy_(source))["median"] * 1e-9, 3)


def matrix_rate() -> float:
    """TFLOP/s of a bf16 product of random matrices of 8192."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return round(2 * 8192**3 / timed(lambda: a @ b)["median"] * 1e-9, 1)


if __name__ == "__main__":
    main()
