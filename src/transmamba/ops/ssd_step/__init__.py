"""ssd_step: one token of ssd_scan, for decoding."""

from torch import Tensor

from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_ssd_inputs
from transmamba.ops.precision import outside_autocast

from .reference import ssd_step_reference
from .torch import ssd_step_torch

__all__ = ["ssd_step", "ssd_step_reference", "ssd_step_torch"]


@outside_autocast
def ssd_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    validate: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance the SSM by one token; return (y, new state). `state` is not modified.

    state (batch, state_heads, state_size, head_dim)    q, k (batch, heads, state_size)    v (batch, heads, head_dim)
    dt (batch, dt_heads), after softplus    A (dt_heads,), < 0    D (heads,) or None
    y (batch, heads, head_dim) in v's dtype.
    Head counts as in ssd_scan. Raises InputError for what breaks the contract.
    """
    check_ssd_inputs("ssd_step", q, k, v, dt, A, D, state=state, step=True, validate=validate)
    implementation = ssd_step_reference if resolve_backend("ssd_step", backend) == "reference" else ssd_step_torch
    return implementation(state, q, k, v, dt, A, D)
