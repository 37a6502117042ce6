"""Prefill and steps beside transformers' Mamba-2 (torch path); decoding of V9 beside the Transformer schedule.

    python benchmarks/models/bench_prefill_decode.py
    python benchmarks/models/bench_prefill_decode.py --part mamba2 --tokens 256,512,1024,2048,4096,8192,16384

Both models of the prefill have the same sizes (no MLP, one B and C per head, gated norm) and as many parameters; they
differ in the norm, which transformers applies to each group. Weights are drawn. Runs alternate in one process; medians
are printed and written with their provenance. The processor's time stands beside the clock's: on a busy machine, its
ratio with --threads 1 is the one to read.
"""

import argparse
import gc
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
from transformers import Mamba2Config, Mamba2Model

from transmamba import TransMambaCache, TransMambaConfig, TransMambaModel, TransPointSchedule
from transmamba.benchmarking.timing import device_name

VOCAB_SIZE = 1024  # embeddings are looked up, and no logits are computed
PARTS = ("prefill", "prefills", "step", "decode")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = {
        "benchmark": "models/bench_prefill_decode",
        "command": f"python {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device_name(torch.device(options.device)),
        "threads": torch.get_num_threads() if options.device == "cpu" else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "sizes": {"layers": options.layers, "hidden_size": options.hidden, "head_dim": options.head_dim},
    }
    with torch.inference_mode():
        if options.part in ("both", "prefill"):
            result["prefill"] = prefill(options, options.tokens[0])
            if options.profile:
                profile_prefill(options)
            gc.collect()
        if options.part == "mamba2":
            result["prefills"] = [prefill(options, tokens) for tokens in options.tokens]
            result["step"] = mamba2_step(options)
        if options.part in ("both", "decode"):
            result["decode"] = decode(options)
    print(json.dumps({part: result[part] for part in PARTS if part in result}, indent=1))
    if not options.no_write:
        RESULTS.mkdir(exist_ok=True)
        name = "mamba2_prefill" if options.part == "mamba2" else "models_prefill_decode"
        file = RESULTS / f"{name}_{options.device}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {file}")


def prefill(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Seconds of a forward pass over so many tokens, batch 1, without a cache."""
    ours, theirs = our_mamba2(options), transformers_mamba2(options)
    ids = torch.randint(VOCAB_SIZE, (1, tokens), device=options.device)
    times = alternate(
        {"transmamba": lambda: ours(ids, use_cache=False), "transformers": lambda: theirs(ids, use_cache=False)},
        options.repeats,
        options.device,
    )
    return {
        "tokens": tokens,
        "parameters": {"transmamba": count_parameters(ours), "transformers": count_parameters(theirs)},
        **summary(times, "transmamba", "transformers"),
    }


def mamba2_step(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a token onto a state, batch 1."""
    models = {"transmamba": our_mamba2(options), "transformers": transformers_mamba2(options)}
    ids = torch.randint(VOCAB_SIZE, (1, 64), device=options.device)
    caches = {
        "transmamba": models["transmamba"](ids, use_cache=True).past_key_values,
        "transformers": models["transformers"](ids, use_cache=True).cache_params,
    }
    keywords = {"transmamba": "past_key_values", "transformers": "cache_params"}

    def step(name: str) -> Callable[[], Any]:
        return lambda: models[name](ids[:, :1], use_cache=True, **{keywords[name]: caches[name]})

    times = alternate({name: step(name) for name in models}, options.steps, options.device)
    return summary(times, "transmamba", "transformers")


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per token at position options.position, batch 1, onto caches that a prefill has filled."""
    schedules = {
        "v9": TransPointSchedule.named("v9", options.layers, options.position).stays_attention_from(options.position),
        "transformer": TransPointSchedule.named("transformer", options.layers),
    }
    model = TransMambaModel(
        TransMambaConfig(
            **sizes(options), intermediate_size=8 * options.hidden // 3 // 64 * 64, trans_points="transformer"
        )
    )
    model = model.to(options.device).eval()
    ids = torch.randint(VOCAB_SIZE, (1, options.position), device=options.device)
    new = ids[:, :1]
    caches: dict[str, TransMambaCache] = {}
    for name, schedule in schedules.items():
        model.set_trans_points(schedule)
        caches[name] = model(ids, use_cache=True).past_key_values

    def step(name: str) -> Callable[[], Any]:
        def run() -> None:
            model.set_trans_points(schedules[name])
            model(new, past_key_values=caches[name])

        return run

    times = alternate({name: step(name) for name in schedules}, options.steps, options.device)
    return {
        "position": options.position,
        "parameters": count_parameters(model),
        "schedules": {name: str(schedule) for name, schedule in schedules.items()},
        "cache_bytes": {name: cache.memory_bytes() for name, cache in caches.items()},
        **summary(times, "v9", "transformer"),
    }


def our_mamba2(options: argparse.Namespace) -> TransMambaModel:
    config = TransMambaConfig(
        **sizes(options), intermediate_size=0, mixer_form="standard", trans_points="mamba2", conv_kernel=4
    )
    return TransMambaModel(config).to(options.device).eval()


def transformers_mamba2(options: argparse.Namespace) -> Mamba2Model:
    heads = options.hidden // options.head_dim
    config = Mamba2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        expand=1,
        num_heads=heads,
        head_dim=options.head_dim,
        state_size=options.head_dim,
        n_groups=heads,
        chunk_size=options.their_chunk_size,
    )
    return Mamba2Model(config).to(options.device).eval()


def sizes(options: argparse.Namespace) -> dict[str, int]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // options.head_dim,
        "max_position_embeddings": 2 * max(options.position, *options.tokens),
    }


def alternate(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each run by the clock and of the processor. Runs take turns, and the first round does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            synchronize(device)
            clock, processor = time.perf_counter(), time.process_time()
            run()
            synchronize(device)
            if number:
                times[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return times


def summary(times: dict[str, list[tuple[float, float]]], ours: str, other: str) -> dict[str, Any]:
    """Least and median seconds of each, and the ratio of ours to the other."""
    found: dict[str, Any] = {}
    for index, kind in enumerate(("seconds", "processor_seconds")):
        columns = {name: [pair[index] for pair in pairs] for name, pairs in times.items()}
        for statistic, function in (("median", statistics.median), ("least", min)):
            values = {name: function(column) for name, column in columns.items()}
            found[f"{statistic}_{kind}"] = {name: round(value, 5) for name, value in values.items()}
            found[f"{statistic}_{kind}_{ours}_over_{other}"] = round(values[ours] / values[other], 4)
    return found


def profile_prefill(options: argparse.Namespace) -> None:
    """Print what takes the time of our prefill."""
    model = our_mamba2(options)
    ids: Tensor = torch.randint(VOCAB_SIZE, (1, options.tokens[0]), device=options.device)
    model(ids, use_cache=False)
    with torch.profiler.profile() as profile:
        model(ids, use_cache=False)
    print(profile.key_averages().table(sort_by=f"self_{options.device}_time_total", row_limit=14))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def lengths(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--part", choices=["both", "prefill", "decode", "mamba2"], default="both")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=lengths, default=[4096], help="of the prefill; several with --part mamba2")
    parser.add_argument("--position", type=int, default=8192, help="of the decoded tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="decoded tokens")
    parser.add_argument("--their-chunk-size", type=int, default=256, help="of transformers' scan; 256 is its default")
    parser.add_argument("--profile", action="store_true", help="print what takes the time of our prefill")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
