"""Which implementation an op uses here, and why. The only place that decides.

`reference` is the specification (sequential, any float dtype), `torch` the fast form in plain PyTorch, on any device.
"""

from dataclasses import dataclass

from transmamba.errors import InputError

_IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "causal_conv1d": ("reference", "torch"),
    "hybrid_mixer": ("reference", "torch"),
    "memory_converter": ("reference", "torch"),
    "selective_scan": ("reference", "torch"),
    "softmax_attention": ("reference", "torch"),
    "ssd_scan": ("reference", "torch"),
    "ssd_step": ("reference", "torch"),
}


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """One line of what `transmamba doctor` prints."""

    op: str
    backend: str
    reason: str


def resolve_backend(op: str, backend: str | None) -> str:
    """Return the backend that `op` will use; raise InputError for one it does not have."""
    known = _IMPLEMENTED[op]
    if backend is None:
        return "torch"
    if backend not in known:
        raise InputError(f"{op} has no backend {backend!r}; choose {' or '.join(map(repr, known))}, or None.")
    return backend


def explain(device: str = "cpu") -> list[BackendChoice]:
    """For every op: the backend that backend=None resolves to on this device type, and why."""
    reasons = {
        "cpu": "matrix products and vector code in plain PyTorch; the only fast form on a CPU",
        "cuda": "plain PyTorch, right but not the fastest; there is no GPU kernel for this op in this version",
    }
    reason = reasons.get(device, "plain PyTorch runs on any device")
    return [BackendChoice(op=op, backend=resolve_backend(op, None), reason=reason) for op in sorted(_IMPLEMENTED)]
