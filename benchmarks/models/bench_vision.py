"""Throughput and memory of Mamba backbones beside the DeiT they are adapted from, by image size.

    python benchmarks/models/bench_vision.py --device cuda

Weights are drawn, products are bf16 (fp32 on a CPU), images as many as fill --tokens tokens. First every student is
compared with itself on the plain PyTorch scan in fp32: logits on every size, gradients on the smallest. Then medians of
forward passes (inference) and of forward and backward passes with the labels' loss (training), and the peak of the
memory above what the weights take. Attention's cost grows with the square of the tokens, a scan's with the tokens: the
size at which the student overtakes is printed, and where it is slower that is seen.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DeiTConfig, DeiTForImageClassification

from transmamba.models import vision_model
from transmamba.ops import backends

RESULTS = Path(__file__).resolve().parents[1] / "results"
CLASSES = 100
# bf16 rounds by 2^-9 relative. A path through L layers sums a few roundings in each, of random sign: sqrt(5 L) of them
# for L = 24 is 11, and logits of drawn weights are sums that cancel, by a factor of two or so.
LOGITS_BOUND = 2**-9 * 11 * 2
GRADIENTS_BOUND = 2 * LOGITS_BOUND  # the way back is as long again
FP32_BOUND = 1e-4


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "benchmark": "models/bench_vision",
        "command": f"python {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads() if options.device == "cpu" else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "scan": backends.resolve_backend("selective_scan", None, torch.empty(1, device=options.device), size=16),
        "patch": options.patch,
        "checks": [check(name, side, options) for name in options.students for side in options.sizes],
        "rows": [],
    }
    print(f"{result['device']}, scan {result['scan']}", flush=True)
    wrong = [row for row in result["checks"] if not row["passed"]]
    if wrong:
        print(json.dumps(wrong, indent=1))
        sys.exit("the students are not what they are on the plain scan; nothing is timed.")
    output = options.output or RESULTS / f"vision_{options.device}_{result['date']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    for side in options.sizes:
        for name in ("deit_tiny", *options.students):
            for training in (False, True):
                row = measure(name, side, training, options)
                result["rows"].append(row)
                write(output, result)  # after every row, for a run that is broken off
                print(
                    "{pixels:5d} px {tokens:5d} tokens {model:17s} {what:9s} {images_per_second:10,.1f} images/s"
                    "  {ms:8.2f} ms for {batch:4d}  {peak_gb}".format(**row),
                    flush=True,
                )
    result["overtakes"] = overtakes(result["rows"], options.students)
    print(json.dumps(result["overtakes"]))
    write(output, result)
    print(f"written to {output}")


def write(output: Path, result: dict[str, Any]) -> None:
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def build(name: str, side: int, options: argparse.Namespace) -> nn.Module:
    sizes = {"image_size": side, "patch_size": options.patch, "num_labels": CLASSES, "hidden_size": options.hidden}
    if name == "deit_tiny":
        config = DeiTConfig(
            **sizes, intermediate_size=4 * options.hidden, num_hidden_layers=options.layers or 12, num_attention_heads=3
        )
        return DeiTForImageClassification(config)
    if options.layers:
        sizes["num_hidden_layers"] = options.layers
    return vision_model(name, **sizes)


def check(name: str, side: int, options: argparse.Namespace) -> dict[str, Any]:
    """The largest relative error of logits, and on the smallest size of gradients, against fp32 and the plain scan."""
    torch.manual_seed(1)
    model = build(name, side, options).to(options.device).eval()
    x = torch.randn(2, 3, side, side, device=options.device)
    labels = torch.randint(CLASSES, (2,), device=options.device)
    with_gradients = side == min(options.sizes)

    def run(dtype: torch.dtype | None) -> list[Tensor]:
        model.zero_grad()
        with torch.set_grad_enabled(with_gradients), autocast(options.device, dtype):
            out = model(x, labels=labels)
        if not with_gradients:
            return [out.logits.float()]
        out.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return [out.logits.detach().float(), gradients]

    dtype = dtype_of(options.device)
    found = run(dtype)
    with backends.prefer("torch"):
        wanted = run(None)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]
    bounds = (LOGITS_BOUND, GRADIENTS_BOUND) if dtype else (FP32_BOUND, FP32_BOUND)
    row = {"model": name, "pixels": side, "errors": errors, "bounds": bounds[: len(errors)]}
    row["passed"] = all(error <= bound for error, bound in zip(errors, bounds, strict=False))
    print(f"{name} at {side} px: errors {', '.join(f'{error:.1e}' for error in errors)}", flush=True)
    return row


def measure(name: str, side: int, training: bool, options: argparse.Namespace) -> dict[str, Any]:
    tokens = (side // options.patch) ** 2
    batch = max(1, options.tokens // tokens)
    model = build(name, side, options).to(options.device).train(training)
    x = torch.randn(batch, 3, side, side, device=options.device)
    labels = torch.randint(CLASSES, (batch,), device=options.device)
    dtype = dtype_of(options.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training), autocast(options.device, dtype):
            out = model(x, labels=labels)
        if training:
            out.loss.backward()

    row = {
        "model": name,
        "what": "training" if training else "inference",
        "pixels": side,
        "tokens": tokens,
        "batch": batch,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    try:
        times, peak = timed(step, options)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return row | {"ms": float("nan"), "images_per_second": float("nan"), "peak_gb": "out of memory"}
    median = statistics.median(times)
    return row | {
        "ms": 1e3 * median,
        "quartiles_ms": [1e3 * q for q in statistics.quantiles(times, n=4)],
        "images_per_second": batch / median,
        "peak_gb": None if peak is None else round(peak / 1e9, 3),
    }


def timed(step: Callable[[], None], options: argparse.Namespace) -> tuple[list[float], int | None]:
    """Seconds of each call, for --seconds in all and at least five; and the peak of memory above the beginning's."""
    on_gpu = options.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    for _ in range(3):
        step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < 5 or sum(times) < options.seconds:
        begun = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return times, torch.cuda.max_memory_allocated() - before if on_gpu else None


def overtakes(rows: list[dict[str, Any]], students: list[str]) -> dict[str, int | None]:
    """The smallest size from which on a student is faster than the DeiT; None where it never is."""
    speed = {(row["model"], row["what"], row["pixels"]): row["images_per_second"] for row in rows}
    found: dict[str, int | None] = {}
    for name in students:
        for what in ("inference", "training"):
            sizes = sorted({row["pixels"] for row in rows}, reverse=True)
            first = None
            for side in sizes:
                if not speed[name, what, side] > speed["deit_tiny", what, side]:
                    break
                first = side
            found[f"{name}, {what}"] = first
    return found


def autocast(device: str, dtype: torch.dtype | None) -> Any:
    return torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None)


def dtype_of(device: str) -> torch.dtype | None:
    return torch.bfloat16 if device == "cuda" else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512, 1024, 1248], help="pixels of a side")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, help="default: those of each model's name")
    parser.add_argument("--students", nargs="+", default=["plain_mamba_tiny", "vim_tiny"])
    parser.add_argument("--tokens", type=int, default=49_152, help="in a batch")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing each")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
