"""A training step and the reading of a prompt, for schedules of one model, each behind a comparison with fp64.

Weights are drawn, which changes no time. The Transformer and Mamba-2 stand in their standard forms: the first without
convolution, gate and state space, the second with gated norm and without rotary embedding.
"""

import gc
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from transmamba.errors import InputError
from transmamba.models import TransMambaConfig, TransMambaForCausalLM
from transmamba.progress import progress_bar

from .timing import Timing, compute_dtype, provenance, time_call

# Hidden states of bf16 weights and products: some 2^-8 for every layer's two additions, in no common direction.
BOUNDS = {torch.bfloat16: 2**-4, torch.float32: 1e-3}
STANDARD = ("transformer", "mamba2")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """Sizes of the model and of the batch. schedules: names that TransPointSchedule.named knows, commas between.

    prefill: lengths of prompts, one row each; none where empty. checked_tokens: of the comparison with fp64, which
    needs a matrix of their square. checkpointing: compute all activations anew in backward; recompute_activations: only
    those that are cheap to compute, the config's field of that name.
    """

    schedules: str = "v9,transformer,mamba2"
    layers: int = 24
    hidden_size: int = 1536
    intermediate_size: int = 4096
    heads: int = 16
    vocab_size: int = 32_000
    seq_len: int = 8192
    batch_size: int = 2
    prefill: str = "8192,32768"
    seconds: float = 3.0
    checked_tokens: int = 4096
    checkpointing: bool = False
    recompute_activations: bool = False

    @staticmethod
    def for_device(device: torch.device) -> "ModelOptions":
        """The paper's 400M configuration on a CUDA device, a small model elsewhere."""
        if device.type == "cuda":
            return ModelOptions()
        return ModelOptions(
            layers=8,
            hidden_size=128,
            intermediate_size=352,
            heads=4,
            vocab_size=512,
            seq_len=512,
            batch_size=2,
            prefill="512,2048",
            seconds=0.5,
            checked_tokens=512,
        )

    @property
    def prompts(self) -> list[int]:
        try:
            lengths = [int(word) for word in self.prefill.split(",") if word]
        except ValueError:
            lengths = [0]
        if any(length < 1 for length in lengths):
            raise InputError(f"prefill {self.prefill!r}: give lengths of prompts, such as 8192,32768, or nothing.")
        return lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRow:
    """One measurement. `what` is "training step" or "prefill"; peak_bytes None where the device does not count."""

    schedule: str
    what: str
    tokens: int
    parameters: int
    error: float
    tokens_per_second: float
    peak_bytes: int | None
    timing: Timing


@dataclass(kw_only=True)
class ModelResult:
    """rows; ratios: tokens a second of the first schedule over each other's. failures: not timed, since wrong."""

    provenance: dict[str, Any]
    options: ModelOptions
    rows: list[ModelRow] = field(default_factory=list)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_model(
    device: torch.device,
    options: ModelOptions | None = None,
    *,
    command: str = "",
    show: Callable[[str], None] = lambda line: None,
) -> ModelResult:
    """Compare each schedule's model with fp64, then time its training step and its prefill.

    A step is forward, backward and AdamW on random tokens, in autocast to bf16 on a CUDA device and fp32 weights.

    Raises:
        ScheduleError: a schedule that is not known. InputError: sizes that do not fit one another.
    """
    options = ModelOptions.for_device(device) if options is None else options
    prompts = options.prompts
    names = [name for name in options.schedules.split(",") if name]
    configs = {name: config_of(options, name) for name in names}
    result = ModelResult(provenance=provenance(device, command), options=options)
    show(f"{result.provenance['device']}: {options.batch_size} x {options.seq_len} tokens a step")
    with progress_bar("Timing", len(names) * (2 + len(prompts))) as advance:
        for name, config in configs.items():
            torch.manual_seed(0)
            with torch.device(device):
                model = TransMambaForCausalLM(config)
            error = disagreement(model, options.checked_tokens)
            advance(1)
            bound = BOUNDS[compute_dtype(device)]
            if not error < bound:
                result.failures.append(
                    f"{name}: hidden states differ from fp64 by {error:.2g}, and {bound:.2g} is allowed; not timed."
                )
                show(f"  WRONG {result.failures[-1]}")
                continue
            for what, tokens in [("training step", options.batch_size * options.seq_len)] + [
                ("prefill", length) for length in prompts
            ]:
                try:
                    timing, peak = _training(model, options) if what != "prefill" else _prefill(model, options, tokens)
                except torch.OutOfMemoryError as memory:
                    result.left_out.append(f"{name}, {what} of {tokens:,} tokens: {str(memory).splitlines()[0]}")
                    show(f"  left out: {result.left_out[-1]}")
                    _release(device)
                    advance(1)
                    continue
                row = ModelRow(
                    schedule=name,
                    what=what,
                    tokens=tokens,
                    parameters=sum(parameter.numel() for parameter in model.parameters()),
                    error=float(f"{error:.2g}"),
                    tokens_per_second=round(tokens / timing.median * 1e3, 1),
                    peak_bytes=peak,
                    timing=timing,
                )
                result.rows.append(row)
                memory_words = "" if peak is None else f"  peak {peak / 1e9:.1f} GB"
                show(
                    f"  {name:12s} {what:14s} {tokens:8,} tokens {timing.median:10.2f} ms  [{timing.quartiles[0]:.2f}, "
                    f"{timing.quartiles[1]:.2f}]  {row.tokens_per_second:12,.0f} tokens/s{memory_words}  error "
                    f"{error:.1e}"
                )
                advance(1)
            del model
            _release(device)
    result.ratios = _ratios(result.rows, names)
    return result


def config_of(options: ModelOptions, schedule: str) -> TransMambaConfig:
    """The model of this schedule, scaled to the length of training; baselines in their standard form."""
    return TransMambaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        max_position_embeddings=options.seq_len,
        trans_points=schedule,
        mixer_form="standard" if schedule in STANDARD else "shared",
        use_cache=False,
        recompute_activations=options.recompute_activations,
    )


def disagreement(model: TransMambaForCausalLM, tokens: int) -> float:
    """The relative error of the last hidden states against the same model in fp64, which runs as plain PyTorch."""
    device = model.device
    ids = _tokens(model, 1, min(tokens, model.config.max_position_embeddings))
    model.eval()
    with torch.no_grad():
        with _autocast(device):
            found = model.model(ids, use_cache=False).last_hidden_state.double()
        exact = deepcopy(model.model).double()(ids, use_cache=False).last_hidden_state
    return ((found - exact).norm() / exact.norm()).item()


def _training(model: TransMambaForCausalLM, options: ModelOptions) -> tuple[Timing, int | None]:
    device = model.device
    model.train()
    if options.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    ids = _tokens(model, options.batch_size, options.seq_len)

    def step() -> None:
        with _autocast(device):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timing, peak = _time_and_peak(step, device, options.seconds)
    if options.checkpointing:
        model.gradient_checkpointing_disable()
    return timing, peak


def _prefill(model: TransMambaForCausalLM, options: ModelOptions, tokens: int) -> tuple[Timing, int | None]:
    device = model.device
    model.eval()
    ids = _tokens(model, 1, tokens)

    def read() -> None:
        with torch.no_grad(), _autocast(device):
            model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return _time_and_peak(read, device, options.seconds / 3)


def _time_and_peak(call: Callable[[], None], device: torch.device, seconds: float) -> tuple[Timing, int | None]:
    if device.type != "cuda":
        return time_call(call, device, seconds=seconds), None
    # A step is long, so nothing has to be cleared: its own weights and activations do it.
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    times: list[float] = []
    hosts: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        begin, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before = time.perf_counter()
        begin.record()
        call()
        after.record()
        hosts.append((time.perf_counter() - before) * 1e3)
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(after))
    return Timing.of(times, hosts), peak


def _tokens(model: TransMambaForCausalLM, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator).to(model.device)


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def _ratios(rows: list[ModelRow], names: list[str]) -> dict[str, dict[str, float]]:
    speed = {(row.schedule, row.what, row.tokens): row.tokens_per_second for row in rows}
    found: dict[str, dict[str, float]] = {}
    for (name, what, tokens), value in speed.items():
        first = speed.get((names[0], what, tokens))
        if name != names[0] and first is not None:
            found.setdefault(f"{what}, {tokens} tokens", {})[f"{names[0]} over {name}"] = round(first / value, 4)
    return found


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
