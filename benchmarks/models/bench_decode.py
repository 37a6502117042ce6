"""Time decode steps under CUDA graphs: V9 with every layer switched beside the Transformer schedule, 1.5B, 32,768.

    python benchmarks/models/bench_decode.py
    python benchmarks/models/bench_decode.py --kernels plain --batch 1,8

Weights are drawn, caches are filled with noise of the right shapes, and steps run at the end of the context. Before
anything is timed, a small model is truly prefilled, and its recorded steps are compared with fp64 across its switches;
and every attention is compared with fp64 at the sizes it will have, of which the Transformer schedule gets the fastest.
kernels: ours, plain (torch's own), or both. Results go to $OUT, or benchmarks/results/, after every line.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from transmamba import TransMambaConfig, TransMambaForCausalLM, TransPointSchedule
from transmamba.benchmarking import measure_rates, provenance, recorded_error, time_call
from transmamba.inference import measure_steps
from transmamba.ops import attention_step
from transmamba.ops.backends import prefer

RESULTS = Path(os.environ.get("OUT") or Path(__file__).resolve().parents[1] / "results")
BOUND = 2**-5  # relative error of bf16 logits after some layers; a lost token is above 1e-1
CROSSING = TransPointSchedule([0, 70, 45, None])  # of the check's model: rows cross TransPoints while decoding
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    options = parse()
    if not torch.cuda.is_available() and not options.dry:
        sys.exit("bench_decode needs a CUDA device; --dry runs it small on a CPU.")
    began = time.perf_counter()
    torch.manual_seed(0)
    result = what_is_measured(options)
    with torch.no_grad():
        measure(options, result, began)
    print(f"done in {time.perf_counter() - began:.0f} s")


def measure(options: argparse.Namespace, result: dict[str, Any], began: float) -> None:
    kinds = ["plain", "ours"] if options.kernels == "both" else [options.kernels]
    usable = []
    for kind in kinds:
        with kernels(kind):
            error = tried(lambda: recorded_error(torch.device(options.device), CROSSING))
        result["checks"][kind] = error
        print(f"{kind}: logits of recorded steps differ from fp64 by {error}, and {BOUND:.3g} is allowed", flush=True)
        if isinstance(error, float) and error < BOUND:
            usable.append(kind)
    write(result)
    if not usable:
        sys.exit("nothing agrees with fp64, so nothing is timed.")
    if options.device == "cuda":
        result["copy_tb_s"] = round(measure_rates(torch.device(options.device)).copy_bytes / 1e12, 3)
    model = build(options)
    weights = sum(x.numel() * x.element_size() for x in model.parameters()) - model.model.embed_tokens.weight.nbytes
    result["weight_bytes"] = weights
    if "copy_tb_s" in result:
        result["weights_ms"] = round(weights / result["copy_tb_s"] / 1e9, 4)
    print(f"weights {weights / 1e9:.3f} GB, read once in {result.get('weights_ms')} ms", flush=True)
    schedules = {
        "v9": TransPointSchedule.named("v9", options.layers, options.trained),
        "transformer": TransPointSchedule.named("transformer", options.layers),
    }
    for batch in options.batch:
        for kind in usable:
            run(model, schedules["v9"], "v9", batch, kind, options, result, began)
    largest = {name: largest_batch(model, schedule, options, weights) for name, schedule in schedules.items()}
    print(f"largest batches within {options.room:g} GB: {largest}", flush=True)
    result["largest_batch"] = largest
    for kind in usable:
        run(model, schedules["v9"], "v9", largest["v9"], kind, options, result, began)
    for batch in sorted({*options.batch, largest["transformer"]}):
        attentions = tried(partial(time_attentions, batch, options))
        print(f"attention of one layer, batch {batch}, ms: {attentions}", flush=True)
        result["attention_ms"][str(batch)] = attentions
        write(result)
        if not isinstance(attentions, dict) or not attentions:
            continue
        best = min(attentions, key=lambda name: attentions[name])
        with replaced_attention(attention_forms()[best]):
            kind = usable[-1]
            run(model, schedules["transformer"], f"transformer, {best}", batch, kind, options, result, began)
    summarise(result)
    write(result)


def run(
    model: TransMambaForCausalLM,
    schedule: TransPointSchedule,
    name: str,
    batch: int,
    kind: str,
    options: argparse.Namespace,
    result: dict[str, Any],
    began: float,
) -> None:
    """Time one schedule and batch, and write it down."""
    model.set_trans_points(schedule)
    free_memory(options.device)
    with kernels(kind):
        found = tried(lambda: measure_steps(model, batch=batch, context=options.context, steps=options.steps))
    row: dict[str, Any] = {
        "schedule": name,
        "kernels": kind,
        "batch": batch,
        "seconds": round(time.perf_counter() - began),
    }
    if isinstance(found, str):
        row["failure"] = found
        print(f"  {name:24s} {kind:6s} batch {batch:5d}  FAILED {found}", flush=True)
    else:
        row |= asdict(found) | {"tokens_per_second": round(found.tokens_per_second, 1)}
        if "weights_ms" in result:
            row["over_weights"] = round(found.step_ms / result["weights_ms"], 3)
        print(
            f"  {name:24s} {kind:6s} batch {batch:5d}  step {found.step_ms:8.3f} ms  loop {found.loop_ms:8.3f} ms  "
            f"{found.tokens_per_second:10,.0f} tokens/s  {row.get('over_weights')} x weights  cache "
            f"{found.cache_bytes / 1e9:.2f} GB  peak {(found.peak_bytes or 0) / 1e9:.1f} GB",
            flush=True,
        )
    result["rows"].append(row)
    write(result)


def summarise(result: dict[str, Any]) -> None:
    """The numbers that targets are set in."""
    rows = [row for row in result["rows"] if "failure" not in row]

    def best(schedule: str, batch: int, field: str = "tokens_per_second") -> float | None:
        return max(
            (row[field] for row in rows if row["schedule"].startswith(schedule) and row["batch"] == batch), default=None
        )

    largest = result["largest_batch"]
    pairs = {"batch 8": (8, 8), "largest": (largest["v9"], largest["transformer"])}
    for name, (ours, theirs) in pairs.items():
        a, b = best("v9", ours), best("transformer", theirs)
        result["summary"][name] = None if a is None or b is None else round(a / b, 2)
    alone = [
        row["over_weights"] for row in rows if row["batch"] == 1 and row["schedule"] == "v9" and "over_weights" in row
    ]
    result["summary"]["batch 1, over the time of reading weights"] = min(alone, default=None)
    print(f"tokens/s of v9 over the Transformer's, and batch 1: {result['summary']}", flush=True)


def build(options: argparse.Namespace) -> TransMambaForCausalLM:
    config = TransMambaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=options.trained,
        trans_points="transformer",
    )
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options.device):
            return TransMambaForCausalLM(config).to(options.device).eval()
    finally:
        torch.set_default_dtype(dtype)


def largest_batch(
    model: TransMambaForCausalLM, schedule: TransPointSchedule, options: argparse.Namespace, weights: int
) -> int:
    """Rows whose caches fill what is left beside the weights, and 3 % for the step itself."""
    c = model.config
    width = 2 * c.num_key_value_heads * c.head_dim * 2
    channels = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    each = 0
    for point in schedule:
        switched = point is not None and point < options.context - options.steps - 2  # and stores no keys any more
        places = 0 if switched else options.context if point is None else min(point, options.context)
        each += places * width + (c.conv_kernel + 32 * (0 not in list(schedule))) * channels * 2
        each += 0 if point is None else places * 4 * c.num_state_heads + 4 * c.num_state_heads * c.head_dim**2
    fits = int((0.97e9 * options.room - weights) / each)
    fits = min(fits, options.most)
    return max(1, fits if fits < 32 else fits // 16 * 16)


def attention_forms() -> dict[str, Attention]:
    """Ways to attend from one token; all but the first two read every place, as rows at the end of a context do."""

    def exactly(*backends: SDPBackend) -> Attention:
        def attend(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
            k, v = keys.transpose(1, 2), values.transpose(1, 2)
            with sdpa_kernel(list(backends)):
                return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=k.shape[1] != q.shape[1])[:, :, 0]

        return attend

    def named(backend: str) -> Attention:
        return lambda q, keys, values, lengths: attention_step(q, keys, values, lengths, backend=backend)

    return {
        "ours": named("triton"),
        "masked": named("torch"),
        "flash": exactly(SDPBackend.FLASH_ATTENTION),
        "cudnn": exactly(SDPBackend.CUDNN_ATTENTION),
        "efficient": exactly(SDPBackend.EFFICIENT_ATTENTION),
        "math": exactly(SDPBackend.MATH),
    }


def time_attentions(batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each attention of one layer that agrees with fp64."""
    free_memory(options.device)
    size = options.hidden // options.heads
    shape, dtype = (batch, options.context, options.heads, size), torch.bfloat16
    keys, values = (torch.randn(shape, device=options.device, dtype=dtype) for _ in range(2))
    q = torch.randn(batch, options.heads, size, device=options.device, dtype=dtype)
    lengths = torch.full((batch,), options.context, device=options.device)
    row = slice(0, 1)
    exact = attention_step(*(x[row].double() for x in (q, keys, values)), lengths[row], backend="torch")
    found = {}
    for name, attend in attention_forms().items():
        y = tried(partial(attend, q, keys, values, lengths))
        error = y if isinstance(y, str) else ((y[row].double() - exact).norm() / exact.norm()).item()
        if not isinstance(error, float) or not error < 2**-6:
            print(f"    {name} is left out: {error}", flush=True)
            continue
        found[name] = time_call(partial(attend, q, keys, values, lengths), q.device).median
    return found


@contextmanager
def replaced_attention(attend: Attention) -> Iterator[None]:
    """Within, steps attend in this way."""
    module = import_module("transmamba.modules.decoding")
    before = module.attention_step
    module.attention_step = attend
    try:
        yield
    finally:
        module.attention_step = before


def kernels(kind: str) -> Any:
    return prefer("triton" if kind == "ours" else "torch")


def tried(call: Callable[[], Any]) -> Any:
    """What the call returns, or what it raised, in one line: a benchmark goes on to its other rows."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def free_memory(device: str) -> None:
    if device == "cuda":
        import gc

        gc.collect()
        torch.cuda.empty_cache()


def what_is_measured(options: argparse.Namespace) -> dict[str, Any]:
    """Provenance, and room for the numbers."""
    command = shlex.join(["python", "benchmarks/models/bench_decode.py", *sys.argv[1:]])
    sizes = ("layers", "hidden", "mlp", "heads", "vocab", "context", "trained")
    return provenance(torch.device(options.device), command) | {
        "dtype": "bfloat16, states float32",
        "sizes": {name: getattr(options, name) for name in sizes},
        "milliseconds": "step: median of single replayed steps between events; loop: a greedy loop by the clock; "
        "attention: median of device time, caches cleared before each run",
        "checks": {},
        "attention_ms": {},
        "rows": [],
        "summary": {},
    }


def write(result: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    words = result["device"].removeprefix("NVIDIA ").lower().split()
    device = words[0] if result["cuda"] else "cpu"
    path = RESULTS / f"decode_{device}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=["both", "ours", "plain"], default="both")
    parser.add_argument("--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--most", type=int, default=10_000, help="rows of the largest batch at most")
    parser.add_argument("--steps", type=int, default=32, help="timed in each of three rounds")
    parser.add_argument("--room", type=float, default=110.0, help="GB for weights, cache and the step")
    parser.add_argument("--dry", action="store_true", help="small, on a CPU, to see that it runs")
    options = parser.parse_args()
    big = {"layers": 64, "hidden": 1536, "mlp": 4096, "heads": 16, "vocab": 32_000, "context": 32_768, "trained": 8192}
    small = {"layers": 3, "hidden": 32, "mlp": 48, "heads": 2, "vocab": 64, "context": 96, "trained": 64}
    for name, value in (small if options.dry else big).items():
        setattr(options, name, value)
    options.device = "cpu" if options.dry else "cuda"
    if options.dry:
        options.most, options.steps = 16, 8
    return options


if __name__ == "__main__":
    main()
