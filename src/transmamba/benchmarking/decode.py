"""Decoding, one token at a time onto a cache that a prompt has filled."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from transmamba.inference import SpeedPoint, measure_speed
from transmamba.models import TransMambaForCausalLM
from transmamba.progress import progress_bar

from .model import ModelOptions, config_of
from .timing import compute_dtype, provenance


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """schedules: names, commas between. context: tokens before the decoded ones."""

    schedules: str = "v9,transformer,mamba2"
    layers: int = 64
    hidden_size: int = 1536
    intermediate_size: int = 4096
    heads: int = 16
    vocab_size: int = 32_000
    seq_len: int = 8192
    context: int = 32_768
    batch_size: int = 1
    steps: int = 32

    @staticmethod
    def for_device(device: torch.device) -> "DecodeOptions":
        """The paper's 1.5B configuration on a CUDA device, a small model elsewhere."""
        if device.type == "cuda":
            return DecodeOptions()
        return DecodeOptions(
            layers=8,
            hidden_size=128,
            intermediate_size=352,
            heads=4,
            vocab_size=512,
            seq_len=512,
            context=1024,
            steps=8,
        )


@dataclass(kw_only=True)
class DecodeResult:
    provenance: dict[str, Any]
    options: DecodeOptions
    points: dict[str, SpeedPoint] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_decoding(
    device: torch.device,
    options: DecodeOptions | None = None,
    *,
    command: str = "",
    show: Callable[[str], None] = lambda line: None,
) -> DecodeResult:
    """Time each schedule's prefill and decoding, after its decoded logits have equalled those of the whole."""
    options = DecodeOptions.for_device(device) if options is None else options
    sizes = ("layers", "hidden_size", "intermediate_size", "heads", "vocab_size", "seq_len")
    model_options = ModelOptions(**{name: getattr(options, name) for name in sizes})
    names = [name for name in options.schedules.split(",") if name]
    configs = {name: config_of(model_options, name) for name in names}
    result = DecodeResult(provenance=provenance(device, command), options=options)
    with progress_bar("Timing", len(names)) as advance:
        for name, config in configs.items():
            torch.manual_seed(0)
            with torch.device(device):
                model = TransMambaForCausalLM(config).to(compute_dtype(device)).eval()
            error = cache_disagreement(model)
            # bf16 logits of two executions differ by a few of their spacings, and fp32 ones by sums in another order.
            bound = 2**-4 if compute_dtype(device) == torch.bfloat16 else 1e-3
            if not error < bound:
                result.failures.append(f"{name}: decoded logits differ by {error:.2g}, and {bound:.2g} is allowed.")
                show(f"  WRONG {result.failures[-1]}")
                continue
            (point,) = measure_speed(
                model, [options.context], batch_size=options.batch_size, decode_steps=options.steps
            )
            result.points[name] = point
            show(
                f"  {name:12s} {options.batch_size} x {options.context:,} tokens: "
                f"{point.decode_tokens_per_second:10,.1f} tokens/s, cache {point.cache_bytes / 1e6:,.1f} MB"
            )
            del model
            advance(1)
    return result


@torch.no_grad()
def cache_disagreement(model: TransMambaForCausalLM, tokens: int = 96) -> float:
    """Relative error of the last logits, decoded one by one onto a cache, against the whole at once."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    whole = model(ids, use_cache=False, logits_to_keep=1).logits.double()
    cache = model(ids[:, : tokens - 8], use_cache=True, logits_to_keep=1).past_key_values
    for position in range(tokens - 8, tokens):
        logits = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True).logits
    return ((logits.double() - whole).norm() / whole.norm()).item()
