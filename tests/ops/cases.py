"""Inputs that are kind to nobody, and the bounds that rounding allows."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.helpers import DEVICE, relative_rms_error
from transmamba.ops.ssd_scan.torch import CHUNK_SIZE, SMALL_CHUNK_SIZE

Inputs = dict[str, Any]

# (q, k, v, dt). Head h of the output reads entry h * count // heads of each.
HEADS: dict[str, tuple[int, int, int, int]] = {
    "one head": (1, 1, 1, 1),
    "equal": (4, 4, 4, 4),
    "grouped-query": (8, 2, 2, 2),
    "grouped-query, a step per head": (8, 2, 2, 8),
    "multi-query": (4, 1, 1, 1),
    "mamba2, one group": (1, 1, 6, 6),
    "mamba2, two groups": (2, 2, 6, 6),
    "not nested": (2, 3, 6, 6),
    "shared steps": (6, 6, 6, 2),
}
SHARED_HEADS = {name: heads for name, heads in HEADS.items() if len(set(heads)) > 1 and min(heads) > 1}

CHUNK = SMALL_CHUNK_SIZE if DEVICE.type == "cpu" else CHUNK_SIZE  # of the tests' small states
LENGTHS = (0, 1, 2, 3, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 1)
# Empty documents first, last and in a row; documents of one token; one of several chunks; whole chunks.
BORDERS: dict[str, list[int]] = {
    "one": [0, CHUNK + 3],
    "nothing": [0, 0, 0],
    "single tokens": [0, 1, 2, 3],
    "uneven": [0, 0, 1, 2, 2, 2, 5, 3 * CHUNK + 6, 3 * CHUNK + 13, 3 * CHUNK + 13],
    "rising": [0, 3, 3 + CHUNK, 4 + 3 * CHUNK],
    "whole chunks": [0, CHUNK, 3 * CHUNK],
}

FP64_BOUND = 1e-10
FAULT_FACTOR = 10.0  # how far above its bound a fault must show


def ssd_inputs(
    heads: tuple[int, int, int, int] = (4, 4, 4, 4),
    *,
    batch: int = 2,
    seq_len: int = 7,
    state_size: int = 6,
    head_dim: int = 5,
    rows: int | None = None,
    skip: bool = True,
    state: bool = True,
    dtype: torch.dtype = torch.float64,
    device: torch.device = DEVICE,
    requires_grad: bool = False,
    seed: int = 0,
) -> Inputs:
    """Return q, k, v, dt, A, D, initial_state (None without skip, state); dt A spreads over about e^-4 to e^1."""
    q_heads, k_heads, v_heads, dt_heads = heads
    state_heads = max(heads[1:])
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    exact = {
        "q": normal(batch, seq_len, q_heads, state_size),
        "k": normal(batch, seq_len, k_heads, state_size),
        "v": normal(batch, seq_len, v_heads, head_dim),
        "dt": softplus(normal(batch, seq_len, dt_heads) - 1),
        "A": -torch.exp(normal(dt_heads) - 1),
        "D": normal(max(heads)) if skip else None,
        "initial_state": normal(batch if rows is None else rows, state_heads, state_size, head_dim) if state else None,
    }
    return {name: None if x is None else x.to(device, dtype).requires_grad_(requires_grad) for name, x in exact.items()}


def long_inputs(seq_len: int) -> Inputs:
    """In fp32. S falls to -seq_len over the row in the first head; the heads remember 1, 100 and 10,000 tokens."""
    inputs = ssd_inputs((3, 3, 3, 3), batch=1, seq_len=seq_len, state=False, dtype=torch.float32)
    rates = torch.tensor([-1.0, -0.01, -0.0001], device=inputs["dt"].device)
    return inputs | {"dt": torch.rand_like(inputs["dt"]) + 0.5, "A": rates}


def without(inputs: Inputs, *names: str) -> Inputs:
    return {name: x for name, x in inputs.items() if name not in names}


def in_double(inputs: Inputs) -> Inputs:
    """The same values, to the last bit, in fp64."""
    return {name: None if x is None else x.detach().double() for name, x in inputs.items()}


def worst_error(actual: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    errors = [relative_rms_error(a, e) for a, e in zip(actual, exact, strict=True)]
    return float("nan") if any(error != error for error in errors) else max(errors)


def gradients(op: Callable[..., Any], inputs: Inputs, **options: Any) -> list[Tensor]:
    """Gradients of every floating input under cotangents that depend on shapes only."""
    leaves = {name: None if x is None else x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = op(**leaves, **options)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return list(torch.autograd.grad(loss, [x for x in leaves.values() if x is not None], materialize_grads=True))


def fp32_bound(inputs: Inputs, *, chunk: int = CHUNK) -> float:
    """u (sqrt(additions) + 2 S sqrt(chunk)): rounding errors are random (Higham & Mary 2019), u = 2^-24.

    An output is a sum over the state, the tokens of a chunk and the chunks. An exponent is the difference of two sums
    over at most a chunk, of size S at most, and an absolute error of an exponent is a relative one of the decay.
    """
    seq_len = max(1, inputs["k"].shape[1])
    window = min(chunk, seq_len)
    additions = inputs["k"].shape[-1] + window + seq_len / chunk
    log_decay = (inputs["dt"].detach().double() * inputs["A"].detach().double()).abs()
    largest = log_decay.unfold(1, window, 1).sum(-1).amax().item() if log_decay.numel() else 0.0
    return 2**-24 * (additions**0.5 + 2 * largest * window**0.5)


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to nearest: half the spacing."""
    return torch.finfo(dtype).eps / 2
