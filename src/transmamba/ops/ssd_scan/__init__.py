"""ssd_scan: the state-space recurrence of Mamba-2 over whole sequences, in attention's letters."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_cu_seqlens, check_ssd_inputs
from transmamba.ops.precision import outside_autocast

from .reference import ssd_scan_reference
from .torch import ssd_scan_torch

__all__ = ["ssd_scan", "ssd_scan_reference", "ssd_scan_torch"]


@overload
def ssd_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_state: Literal[False] = False,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor: ...
@overload
def ssd_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_state: Literal[True],
    validate: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@outside_autocast
def ssd_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_state: bool = False,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y with h_t = exp(dt_t A) h_{t-1} + dt_t k_t v_t^T and y_t = q_t^T h_t + D v_t; no scale.

    Args:
        q: queries (Mamba-2's C), (batch, seq_len, q_heads, state_size).
        k: keys (B), (batch, seq_len, k_heads, state_size).
        v: values (x), (batch, seq_len, v_heads, head_dim).
        dt: step sizes after softplus, (batch, seq_len, dt_heads), >= 0.
        A: decay rates, (dt_heads,), < 0.
        D: skip weights, (heads,), or None. heads = max of the four counts; head h reads entry h * count // heads.
        initial_state: (rows, state_heads, state_size, head_dim) with state_heads = max(k_heads, v_heads, dt_heads);
            rows = batch, or the number of documents when packed. Zeros when None.
        cu_seqlens: borders of packed documents, [0, ..., seq_len], batch 1. Each document starts from its own state.
        return_final_state: also return the state after each row's (document's) last token, fp32 (fp64 for fp64 inputs).
        validate: read the values on the CPU for NaN, dt < 0 and A >= 0.
        backend: "reference" | "torch" | "triton" | None, which takes "triton" on CUDA devices where it can run.

    Returns:
        y (batch, seq_len, heads, head_dim) in v's dtype; with return_final_state, (y, state).

    Raises:
        InputError: shapes, head counts, dtypes, devices or values that break the contract.

    Source: Dao & Gu 2024 (arXiv 2405.21060), sections 2 and 6; TransMamba (arXiv 2503.24067), eq. 4 and 5 with the
    state kept.
    """
    rows = None if cu_seqlens is None else len(cu_seqlens) - 1
    check_ssd_inputs("ssd_scan", q, k, v, dt, A, D, state=initial_state, num_states=rows, validate=validate)
    borders = None if cu_seqlens is None else check_cu_seqlens("ssd_scan", cu_seqlens, k.shape[0], k.shape[1])
    name = resolve_backend("ssd_scan", backend, k, v)
    if name == "triton":
        from .triton import ssd_scan_triton

        y, state = ssd_scan_triton(q, k, v, dt, A, D, initial_state=initial_state, cu_seqlens=borders)
    else:
        implementation = ssd_scan_reference if name == "reference" else ssd_scan_torch
        y, state = implementation(q, k, v, dt, A, D, initial_state=initial_state, cu_seqlens=borders)
    return (y, state) if return_final_state else y
