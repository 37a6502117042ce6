"""Tokens per second and bytes of memory against the length of the context, prefill and decoding apart.

Any causal language model of transformers can be timed, with the cache that it makes for itself.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from transmamba.errors import InputError
from transmamba.modules import TransMambaCache
from transmamba.progress import progress_bar

__all__ = ["SpeedPoint", "measure_speed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedPoint:
    """Measured at one length of context, medians over the repeats; one sequence unless batch_size says otherwise."""

    length: int
    prefill_tokens_per_second: float  # reading `length` tokens at once
    decode_tokens_per_second: float  # then one token at a time
    cache_bytes: int  # after reading, unused room included
    peak_bytes: int | None  # most memory in use at once, weights included; None where the device does not count


@torch.no_grad()
def measure_speed(
    model: PreTrainedModel,
    lengths: Sequence[int],
    *,
    batch_size: int = 1,
    decode_steps: int = 16,
    repeats: int = 3,
    seed: int = 0,
) -> list[SpeedPoint]:
    """Time the model on random tokens, after one warm-up per length. The first decoded token is not timed."""
    if any(length < 1 for length in lengths) or batch_size < 1 or decode_steps < 2 or repeats < 1:
        raise InputError(
            f"lengths={list(lengths)}, batch_size={batch_size}, decode_steps={decode_steps}, repeats={repeats}: "
            "give lengths, batch_size and repeats >= 1, and decode_steps >= 2."
        )
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    points = []
    try:
        with progress_bar("Timing", len(lengths) * (repeats + 1)) as advance:
            for length in lengths:
                tokens = torch.randint(vocab_size, (batch_size, length + decode_steps), generator=generator)
                tokens = tokens.to(model.device)
                timings = []
                for _ in range(repeats + 1):
                    timings.append(_time_once(model, tokens, length))
                    advance(1)
                prefill, decode = (median(column) for column in list(zip(*timings[1:], strict=True))[:2])
                points.append(
                    SpeedPoint(
                        length=length,
                        prefill_tokens_per_second=batch_size * length / prefill,
                        decode_tokens_per_second=batch_size * (decode_steps - 1) / decode,
                        cache_bytes=timings[0][2],
                        peak_bytes=timings[-1][3],
                    )
                )
    finally:
        model.train(was_training)
    return points


def _time_once(model: PreTrainedModel, tokens: torch.Tensor, length: int) -> tuple[float, float, int, int | None]:
    """Seconds of prefill and of decoding, bytes of the cache, and of the most memory in use."""
    counts = model.device.type == "cuda"
    if counts:
        torch.cuda.reset_peak_memory_stats(model.device)
    start = _now(model.device)
    cache = model(tokens[:, :length], use_cache=True, logits_to_keep=1).get("past_key_values")
    prefill = _now(model.device) - start
    if cache is None:
        raise InputError(f"{type(model).__name__} gives no past_key_values, so its decoding cannot be timed.")
    cache_bytes = _cache_bytes(cache)
    model(tokens[:, length : length + 1], past_key_values=cache, use_cache=True)
    start = _now(model.device)
    for position in range(length + 1, tokens.shape[1]):
        model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
    decode = _now(model.device) - start
    return prefill, decode, cache_bytes, torch.cuda.max_memory_allocated(model.device) if counts else None


def _cache_bytes(cache: Cache) -> int:
    if isinstance(cache, TransMambaCache):
        return cache.memory_bytes()
    tensors = {x.data_ptr(): x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
