"""What a training step of a language model keeps for its backward pass, per layer and place in the code.

    TRITON_INTERPRET=1 python benchmarks/models/bench_saved_memory.py
    python benchmarks/models/bench_saved_memory.py --device cuda --tokens 8192 --batch 2

A unit is a tensor (tokens, hidden_size) in bf16. Every block of memory that autograd holds after forward counts once,
however many read it, at the line that kept it first. Parameters do not count; what autocast makes of weights counts by
itself, in bytes. Layers are of the 400M configuration, and as many as V9 has TransPoints. On a CPU, Triton's
interpreter runs the kernels, so that what they keep counts (minutes), and RMSNorm keeps what torch's does on a GPU: its
input and a number a token. With few tokens, states weigh more than in a long row, where a unit is larger.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transmamba.benchmarking import ModelOptions, provenance
from transmamba.benchmarking.model import config_of
from transmamba.models import TransMambaForCausalLM
from transmamba.ops.backends import prefer

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGE = f"{os.sep}transmamba{os.sep}"
HELPERS = ("recomputation.py", "plain.py", "precision.py", "launching.py")  # whose callers are the place
SCHEDULES = ("v9", "transformer", "mamba2")


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            sys.exit("on a CPU, set TRITON_INTERPRET=1: plain PyTorch keeps other tensors than the kernels do.")
        nn.RMSNorm.forward = lambda norm, x: _FusedNorm.apply(x, norm.weight, norm.eps)  # type: ignore[method-assign]
    sizes = replace(ModelOptions.for_device(torch.device("cuda")), layers=options.layers, seq_len=options.tokens)
    words = ["TRITON_INTERPRET=1"] if device.type == "cpu" else []
    words += ["python benchmarks/models/bench_saved_memory.py"]
    given = {name: value for name, value in vars(options).items() if name != "output"}
    words += [f"--{name} {value}" for name, value in given.items()]
    result: dict[str, Any] = {
        "provenance": provenance(device, " ".join(words)) | {"dtype": "bfloat16"},
        "options": given,
        "unit": "one tensor (tokens, hidden_size) in bf16; weights: MB (10^6 bytes) of casts; both per layer. Of the "
        "units, 3 / layers are the final norm's input and the head's",
        "rows": [],
    }
    output = options.output or RESULTS / f"saved_memory_{device.type}_{result['provenance']['date']}.json"
    for schedule in SCHEDULES:
        for recompute in (False, True):
            config = config_of(replace(sizes, vocab_size=64, recompute_activations=recompute), schedule)
            row = {"schedule": schedule, "recompute_activations": recompute} | measure(config, options, device)
            result["rows"].append(row)
            weights = f"{row['weights_mb']:6.1f} MB of weights"
            print(f"{schedule:12s} recompute {recompute!s:5s} {row['units']:7.3f} units and {weights} a layer")
            for place, units in row["places"].items():
                print(f"    {units:7.3f}  {place}")
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--output", type=Path, help="a JSON file; default: in benchmarks/results, by device and date")
    return parser.parse_args()


def measure(config: Any, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Units and MB of weights per layer, and units by place."""
    torch.manual_seed(0)
    with torch.device(device):
        model = TransMambaForCausalLM(config).train()
        ids = torch.randint(config.vocab_size, (options.batch, options.tokens))
    kept = Kept(model)
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x)
    with prefer("triton", interpreted=device.type == "cpu"), hooks, torch.autocast(device.type, torch.bfloat16):
        model(ids, use_cache=False)
    unit = options.batch * options.tokens * config.hidden_size * 2
    places: dict[str, float] = defaultdict(float)
    weights = 0
    for x, place in kept.blocks.values():
        size = x.untyped_storage().nbytes()
        if kept.is_weight(x):
            weights += size
        elif place:  # outside of the layers there is the head alone
            places[place] += size / unit / config.num_hidden_layers
    return {
        "units": round(sum(places.values()), 4),
        "weights_mb": round(weights / config.num_hidden_layers / 1e6, 3),
        "places": {place: round(size, 4) for place, size in sorted(places.items(), key=lambda item: -item[1])},
    }


class Kept:
    """Hooks that note every block of memory once, with the line that had it kept."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks: dict[int, tuple[Tensor, str]] = {}
        self._parameters = {x.untyped_storage()._cdata for x in model.parameters()}
        self._shapes = {tuple(x.shape) for x in model.parameters() if x.dim() == 2}

    def pack(self, x: Tensor) -> Tensor:
        block = x.untyped_storage()._cdata
        if block not in self._parameters and block not in self.blocks:
            self.blocks[block] = (x.detach(), _place())  # held, so that no other block gets its address
        return x

    def is_weight(self, x: Tensor) -> bool:
        return tuple(x.shape) in self._shapes or tuple(x.shape[::-1]) in self._shapes


class _FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps what torch's keeps on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return x * inverse * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        raise NotImplementedError("here nothing goes backward.")


def _place() -> str:
    """File and function of the package, below the model's own forward; empty outside of its layers."""
    frame, found, inside = sys._getframe(2), "", False
    while frame is not None:
        file = frame.f_code.co_filename
        if PACKAGE in file and not file.endswith(HELPERS):
            where = f"{file.rpartition(PACKAGE)[2]} {frame.f_code.co_name}"
            found = found or where
            inside = inside or "mixer.py" in where or "mlp.py" in where or "modeling.py forward" in where
        frame = frame.f_back  # type: ignore[assignment]
    return found if inside else ""


if __name__ == "__main__":
    main()
