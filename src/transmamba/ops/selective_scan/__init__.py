"""selective_scan: Mamba-1's recurrence, where every channel has its own decay, in mamba_ssm's names and layouts."""

from typing import Literal, overload

from torch import Tensor

from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_selective_inputs
from transmamba.ops.precision import outside_autocast

from .reference import selective_scan_reference
from .torch import selective_scan_torch

__all__ = ["selective_scan", "selective_scan_reference", "selective_scan_torch"]


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: Literal[False] = False,
    *,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    *,
    return_last_state: Literal[True],
    validate: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@outside_autocast
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    *,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y with h_t = exp(d_t A) h_{t-1} + d_t B_t u_t and y_t = (C_t . h_t + D u_t) silu(z_t), d the steps.

    Args:
        u: inputs (Mamba's x), (batch, dim, seq_len).
        delta: steps before bias and softplus, (batch, dim, seq_len).
        A: decay rates, (dim, state_size), <= 0.
        B, C: what is written and read, (batch, state_size, seq_len) for all channels, or (batch, groups, state_size,
            seq_len); groups divide dim, and channel c reads group c // (dim / groups).
        D: skip weights, (dim,), or None.
        z: gates, (batch, dim, seq_len), or None.
        delta_bias: added to delta, (dim,), or None.
        delta_softplus: the step is softplus(delta + delta_bias); otherwise delta + delta_bias, which must be >= 0.
        initial_state: (batch, dim, state_size); zeros when None.
        return_last_state: also return the state after the last token, fp32 (fp64 for fp64 inputs).
        validate: read the values on the CPU for NaN, A > 0 and steps < 0.
        backend: "reference" | "torch" | "triton" | None.

    Returns:
        y (batch, dim, seq_len) in u's dtype; with return_last_state, (y, state).

    Raises:
        InputError: shapes, dtypes, devices or values that break the contract.

    Source: Gu & Dao 2023 (arXiv 2312.00752), section 3.
    """
    check_selective_inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, validate=validate)
    name = resolve_backend("selective_scan", backend, u, size=A.shape[1])
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    if name == "triton":
        from .triton import selective_scan_triton

        y, state = selective_scan_triton(*arguments)
    else:
        y, state = (selective_scan_reference if name == "reference" else selective_scan_torch)(*arguments)
    return (y, state) if return_last_state else y
