"""Embedding one document, by its length: a bidirectional Mamba-2 and a BERT of MiniLM-L6's sizes whose positions reach.

    python benchmarks/models/bench_text_encoder.py --out results.json

Random weights; both are checked first: finite, and the student in fp32 equal to itself with the row padded. Medians
and quartiles in ms over --repeats. On CUDA products are in bf16, BERT attends without a mask by SDPA, which takes its
fastest kernel, and each model is timed as PyTorch launches it and as a CUDA graph, where it can be captured.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from transmamba.inference import resolve_device
from transmamba.memory import keep_freed_memory
from transmamba.models import BiMamba2Config, BiMamba2Model
from transmamba.recipes.run_folder import provenance

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def models(longest: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    student = BiMamba2Model(BiMamba2Config())
    teacher = BertModel(
        BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            max_position_embeddings=longest,
            attn_implementation="sdpa",
        ),
        add_pooling_layer=False,
    )
    return {"bimamba2": student.eval(), "bert": teacher.eval()}


def check(student: nn.Module, device: torch.device) -> float:
    """The largest difference of an embedding of 300 tokens alone and padded to 400, in fp32."""
    ids = torch.randint(1000, 30000, (1, 400), device=device)
    mask = (torch.arange(400, device=device) < 300).long()[None]
    alone, padded = student(ids[:, :300]).pooler_output, student(ids, mask).pooler_output
    difference = float((alone - padded).abs().max())
    assert torch.isfinite(padded).all()
    assert difference < 1e-4, difference  # of unit vectors; products may be TF32
    return difference


def timed(run: Callable[[], Tensor], device: torch.device, repeats: int) -> dict[str, float]:
    for _ in range(3 if device.type == "cuda" else 1):
        assert torch.isfinite(run()).all()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"ms": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def as_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--batches", default="1")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep-memory", action="store_true", help="both models keep memory they free, as commands do")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = resolve_device(args.device)
    keeps_memory = args.keep_memory and keep_freed_memory()
    lengths = [int(one) for one in args.lengths.split(",")]
    both = {name: model.to(device) for name, model in models(max(lengths)).items()}
    difference = check(both["bimamba2"], device)
    print(f"padding changes an embedding by at most {difference:.1e}", flush=True)
    if device.type == "cuda":
        both = {name: model.to(torch.bfloat16) for name, model in both.items()}
    rows: list[dict[str, Any]] = []
    content = {
        "what": "ms to embed a batch of documents of one length, medians and quartiles",
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "padding_difference": difference,
        "rows": rows,
        "date": datetime.now(UTC).date().isoformat(),
        **provenance(device.type),
    }
    for batch in map(int, args.batches.split(",")):
        for length in lengths:
            ids = torch.randint(1000, 30000, (batch, length), device=device)
            row: dict[str, Any] = {"batch": batch, "length": length, "keeps_freed_memory": keeps_memory}
            for name, model in both.items():

                def run(model: nn.Module = model, ids: Tensor = ids) -> Tensor:
                    return model(input_ids=ids).last_hidden_state.mean(1)

                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                row[name] = timed(run, device, args.repeats)
                if device.type == "cuda":
                    row[name]["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
                    try:
                        replay = as_graph(run)
                        error = float((replay() - run()).abs().max())
                        row[f"{name}_graph"] = timed(replay, device, args.repeats) | {"difference": error}
                    except (RuntimeError, AssertionError) as problem:
                        row[f"{name}_graph"] = {"failed": " ".join(str(problem).split())[:200]}
            row["times_faster"] = round(row["bert"]["ms"] / row["bimamba2"]["ms"], 2)
            if "ms" in row.get("bert_graph", {}) and "ms" in row.get("bimamba2_graph", {}):
                row["times_faster_graph"] = round(row["bert_graph"]["ms"] / row["bimamba2_graph"]["ms"], 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out is not None:  # after every row, for a run that is broken off
                args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
