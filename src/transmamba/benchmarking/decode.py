"""Decoding: recorded steps, as generation takes them, at the end of a long context."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from transmamba.inference import StepTiming, measure_steps
from transmamba.models import TransMambaConfig, TransMambaForCausalLM
from transmamba.models.transmamba.decoding import Decoder, run_eagerly
from transmamba.progress import progress_bar
from transmamba.schedule import TransPointSchedule

from .model import ModelOptions, config_of
from .timing import compute_dtype, provenance

PROMPT, WRITTEN = 60, 64  # tokens of the check


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """schedules, batches: names and rows, commas between. context: tokens before the decoded ones, of noise."""

    schedules: str = "v9,transformer,mamba2"
    batches: str = "1,8"
    layers: int = 64
    hidden_size: int = 1536
    intermediate_size: int = 4096
    heads: int = 16
    vocab_size: int = 32_000
    seq_len: int = 8192
    context: int = 32_768
    steps: int = 32

    @staticmethod
    def for_device(device: torch.device) -> "DecodeOptions":
        """The paper's 1.5B configuration on a CUDA device, a small model elsewhere."""
        if device.type == "cuda":
            return DecodeOptions()
        return DecodeOptions(
            batches="1",
            layers=8,
            hidden_size=128,
            intermediate_size=352,
            heads=4,
            vocab_size=512,
            seq_len=512,
            context=1024,
            steps=8,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRow:
    """error: relative, of the check's logits."""

    schedule: str
    timing: StepTiming
    error: float


@dataclass(kw_only=True)
class DecodeResult:
    provenance: dict[str, Any]
    options: DecodeOptions
    rows: list[DecodeRow] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        result = asdict(self)
        for row, numbers in zip(self.rows, result["rows"], strict=True):
            numbers["tokens_per_second"] = row.timing.tokens_per_second
        return result


def measure_decoding(
    device: torch.device,
    options: DecodeOptions | None = None,
    *,
    command: str = "",
    show: Callable[[str], None] = lambda line: None,
) -> DecodeResult:
    """Time recorded steps of each schedule and batch, after those of a small model have agreed with fp64."""
    options = DecodeOptions.for_device(device) if options is None else options
    sizes = ("layers", "hidden_size", "intermediate_size", "heads", "vocab_size", "seq_len")
    model_options = ModelOptions(**{name: getattr(options, name) for name in sizes})
    names = [name for name in options.schedules.split(",") if name]
    configs = {name: config_of(model_options, name) for name in names}
    batches = [int(number) for number in options.batches.split(",") if number]
    result = DecodeResult(provenance=provenance(device, command), options=options)
    with progress_bar("Timing", len(names) * len(batches)) as advance:
        for name, config in configs.items():
            error = recorded_error(device, TransPointSchedule.named(name, 4, PROMPT + WRITTEN))
            # bf16 logits of two executions differ by a few of their spacings, and fp32 ones by sums in another order.
            bound = 2**-4 if compute_dtype(device) == torch.bfloat16 else 1e-3
            if not error < bound:
                result.failures.append(f"{name}: decoded logits differ by {error:.2g}, and {bound:.2g} is allowed.")
                show(f"  WRONG {result.failures[-1]}")
                continue
            torch.manual_seed(0)
            with torch.device(device):
                model = TransMambaForCausalLM(config).to(compute_dtype(device)).eval()
            for batch in batches:
                timing = measure_steps(model, batch=batch, context=options.context, steps=options.steps)
                result.rows.append(DecodeRow(schedule=name, timing=timing, error=error))
                show(
                    f"  {name:12s} {batch} x {options.context:,} tokens: step {timing.step_ms:8.3f} ms  "
                    f"{timing.tokens_per_second:10,.1f} tokens/s, cache {timing.cache_bytes / 1e6:,.1f} MB"
                )
                advance(1)
            del model
    return result


def recorded_error(device: torch.device, trans_points: TransPointSchedule) -> float:
    """Relative error of recorded steps' logits against fp64, of rows of three lengths in a batch: a small model writes
    WRITTEN tokens behind a prompt of up to PROMPT.
    """
    config = TransMambaConfig(
        vocab_size=512,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=len(trans_points),
        num_attention_heads=4,
        max_position_embeddings=512,
        trans_points=trans_points.to_list(),
    )
    draws = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(1)
        model = TransMambaForCausalLM(config).to(device, compute_dtype(device)).eval()
    ids = torch.randint(1, config.vocab_size, (3, PROMPT), generator=draws).to(device)
    mask = torch.ones_like(ids)
    mask[1, : PROMPT // 4], mask[2, : 2 * PROMPT // 3] = 0, 0
    if device.type != "cuda":
        model.decoder = Decoder(run_eagerly)
    given = {"max_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    outs = [model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **given) for _ in range(2)]
    if not torch.equal(outs[0].sequences, outs[1].sequences) or not model.decoder.sessions:
        return float("nan")  # steps were not recorded, or two runs of the same wrote different tokens
    whole = torch.cat([mask, torch.ones_like(outs[1].sequences[:, PROMPT:])], dim=1)
    with torch.no_grad():
        exact = model.double()(outs[1].sequences, attention_mask=whole, use_cache=False).logits[:, PROMPT - 1 : -1]
    found = torch.stack(outs[1].logits, dim=1).double()
    return ((found - exact).norm() / exact.norm()).item()
