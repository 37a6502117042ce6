"""Tokens per second and bytes of cache against the length of the context, prefill and decoding apart."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from transmamba.errors import InputError
from transmamba.models import TransMambaForCausalLM


@dataclass(frozen=True, kw_only=True)
class SpeedPoint:
    """Measured at one length of context, medians over the repeats; one sequence unless batch_size says otherwise."""

    length: int
    prefill_tokens_per_second: float  # reading `length` tokens at once
    decode_tokens_per_second: float  # then one token at a time
    cache_bytes: int  # after reading, unused room included


@torch.no_grad()
def measure_speed(
    model: TransMambaForCausalLM,
    lengths: Sequence[int],
    *,
    batch_size: int = 1,
    decode_steps: int = 16,
    repeats: int = 3,
    seed: int = 0,
) -> list[SpeedPoint]:
    """Time the model on random tokens, after one warm-up per length. The first decoded token is not timed."""
    if any(length < 1 for length in lengths) or decode_steps < 2 or repeats < 1:
        raise InputError(
            f"lengths={list(lengths)}, decode_steps={decode_steps}, repeats={repeats}: "
            "give lengths >= 1, decode_steps >= 2, repeats >= 1."
        )
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    points = []
    for length in lengths:
        tokens = torch.randint(model.config.vocab_size, (batch_size, length + decode_steps), generator=generator).to(
            model.device
        )
        timings = [_time_once(model, tokens, length) for _ in range(repeats + 1)][1:]
        points.append(
            SpeedPoint(
                length=length,
                prefill_tokens_per_second=batch_size * length / median(prefill for prefill, _, _ in timings),
                decode_tokens_per_second=batch_size * (decode_steps - 1) / median(decode for _, decode, _ in timings),
                cache_bytes=timings[0][2],
            )
        )
    model.train(was_training)
    return points


def _time_once(model: TransMambaForCausalLM, tokens: torch.Tensor, length: int) -> tuple[float, float, int]:
    cache = model.make_cache()
    start = _now(model.device)
    model(tokens[:, :length], past_key_values=cache, logits_to_keep=1)
    prefill = _now(model.device) - start
    cache_bytes = cache.memory_bytes()
    model(tokens[:, length : length + 1], past_key_values=cache)
    start = _now(model.device)
    for position in range(length + 1, tokens.shape[1]):
        model(tokens[:, position : position + 1], past_key_values=cache)
    return prefill, _now(model.device) - start, cache_bytes


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
