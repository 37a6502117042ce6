"""Which implementation an op uses here, and why. The only place that decides.

`reference` is the specification (sequential, any float dtype), `torch` the fast form in plain PyTorch, on any device,
`triton` our GPU kernels.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from transmamba.errors import InputError

logger = logging.getLogger(__name__)

_IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "attention_step": ("reference", "torch", "triton"),
    "bidirectional_scan": ("reference", "torch", "triton"),
    "causal_conv1d": ("reference", "torch", "triton"),
    "conv_ssd_step": ("reference", "torch", "triton"),
    "gated_rms_norm": ("reference", "torch", "triton"),
    "hybrid_mixer": ("reference", "torch", "triton"),
    "logit_distillation": ("reference", "torch", "triton"),
    "memory_converter": ("reference", "torch", "triton"),
    "merge_scans": ("reference", "torch", "triton"),
    "post_norm": ("reference", "torch", "triton"),
    "residual_norm": ("reference", "torch", "triton"),
    "selective_scan": ("reference", "torch", "triton"),
    "softmax_attention": ("reference", "torch"),
    "ssd_scan": ("reference", "torch", "triton"),
    "ssd_step": ("reference", "torch", "triton"),
    "step_linear": ("reference", "torch", "triton"),
    "token_cosines": ("reference", "torch", "triton"),
}
# Kernels that no card has run. Each becomes the default, by leaving this line, when its tests marked `gpu` have passed
# on one; until then backend="triton" asks for it.
_UNPROVEN: tuple[str, ...] = ()
_preferred: dict[str, str] = {}
TRITON_MISSING = "" if find_spec("triton") else "triton is not installed (pip install 'transmamba[triton]')"
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_MAX_SIZE = 256  # of state_size and head_dim; beyond it a program's registers do not hold a state's columns
TRITON_MAX_STATE_SIZE = 64  # of selective_scan, where a thread holds states of a channel, not a program
TRITON_CAPABILITY = (8, 0)  # the first GPUs with bf16 and tf32 matrix units


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """One line of what `transmamba doctor` prints."""

    op: str
    backend: str
    reason: str


def resolve_backend(op: str, backend: str | None, *inputs: Tensor, size: int | None = None) -> str:
    """Return the backend that `op` will use on these tensors, of which all share a device and a dtype.

    size: what the kernels' registers must hold, 0 if nothing; by default, the largest last dimension.

    Raises InputError for a backend that the op does not have, or that cannot run on them.
    """
    known = _IMPLEMENTED[op]
    preferred = _preferred.get(op) if backend is None else None
    if preferred == "torch":
        return "torch"
    if backend is not None and backend not in known:
        raise InputError(f"{op} has no backend {backend!r}; choose {' or '.join(map(repr, known))}, or None.")
    if "triton" not in known or backend in ("reference", "torch"):
        return backend or "torch"
    unproven = op in _UNPROVEN and preferred is None
    anywhere = preferred == "interpreted"
    if backend is None and (unproven or not inputs or not (anywhere or inputs[0].device.type == "cuda")):
        return "torch"
    obstacle = _obstacle(op, inputs, size)
    if backend == "triton":
        if obstacle:
            raise InputError(f"{op} cannot run on backend 'triton': {obstacle}; pass backend='torch', or None.")
        return "triton"
    if obstacle:
        if not torch.compiler.is_compiling():
            _announce(op, obstacle)
        return "torch"
    return "triton"


@contextmanager
def prefer(backend: Literal["torch", "triton"], *ops: str, interpreted: bool = False) -> Iterator[None]:
    """Within, backend=None means this one for these ops: to compare the two, and to run kernels yet to be passed.

    No names mean all ops. Where there is no kernel for the tensors, plain PyTorch runs as ever. interpreted: kernels
    also run on a CPU, by Triton's interpreter (TRITON_INTERPRET=1).
    """
    before = dict(_preferred)
    _preferred.update(dict.fromkeys(ops or _IMPLEMENTED, "interpreted" if interpreted else backend))
    try:
        yield
    finally:
        _preferred.clear()
        _preferred.update(before)


def explain(device: str = "cpu") -> list[BackendChoice]:
    """For every op: the backend that backend=None resolves to on this device type, and why."""
    return [_explain(op, device) for op in sorted(_IMPLEMENTED)]


def _explain(op: str, device: str) -> BackendChoice:
    if device == "cuda" and "triton" in _IMPLEMENTED[op]:
        if TRITON_MISSING:
            return BackendChoice(op=op, backend="torch", reason=f"plain PyTorch, since {TRITON_MISSING}")
        if op in _UNPROVEN:
            reason = "plain PyTorch; its GPU kernels have not been checked on a card yet: backend='triton' runs them"
            return BackendChoice(op=op, backend="torch", reason=reason)
        reason = "our GPU kernels, for bf16, fp16 and fp32; fp64 runs as plain PyTorch"
        return BackendChoice(op=op, backend="triton", reason=reason)
    reasons = {
        "cpu": "matrix products and vector code in plain PyTorch; the only fast form on a CPU",
        "cuda": "plain PyTorch, right but not the fastest; there is no GPU kernel for this op in this version",
    }
    reason = reasons.get(device, "plain PyTorch runs on any device")
    return BackendChoice(op=op, backend="torch", reason=reason)


def _obstacle(op: str, inputs: tuple[Tensor, ...], size: int | None) -> str:
    """Why the Triton kernels cannot run on these tensors; empty if they can."""
    if TRITON_MISSING or not inputs:
        return TRITON_MISSING
    x = inputs[0]
    if x.dtype not in TRITON_DTYPES:
        return f"its kernels are for bf16, fp16 and fp32, and the inputs are {str(x.dtype).removeprefix('torch.')}"
    size = max(int(x.shape[-1]) for x in inputs) if size is None else size
    what, largest = "state_size and head_dim", TRITON_MAX_SIZE
    if op == "selective_scan":
        what, largest = "state_size", TRITON_MAX_STATE_SIZE
    if size > largest:
        return f"its kernels are for {what} up to {largest}, and here it is {size}"
    if x.device.type == "cuda":
        capability = _capability(x.device)
        if capability < TRITON_CAPABILITY:
            needed, found = (".".join(map(str, pair)) for pair in (TRITON_CAPABILITY, capability))
            return f"its kernels need compute capability {needed}, and {x.device} has {found}"
        return ""
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"its kernels need a CUDA device, and the inputs are on {x.device}"


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)  # says each thing once
def _announce(op: str, obstacle: str) -> None:
    logger.warning("%s runs as plain PyTorch, which is slower: %s", op, obstacle)
