"""memory_converter: what attention gathered over a prefix, as the state of the SSM that takes over."""

from collections.abc import Sequence

from torch import Tensor

from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_cu_seqlens, check_ssd_inputs
from transmamba.ops.precision import outside_autocast

from .reference import memory_converter_reference
from .torch import memory_converter_torch

__all__ = ["memory_converter", "memory_converter_reference", "memory_converter_torch"]


@outside_autocast
def memory_converter(
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Return the state a Mamba-2 layer would hold after these keys and values: sum_j exp(S_P - S_j) dt_j k_j v_j^T.

    Args:
        k: un-rotated keys of the prefix, (batch, prefix, k_heads, state_size).
        v: values, (batch, prefix, v_heads, head_dim).
        dt: step sizes after softplus, (batch, prefix, dt_heads). The paper's eq. 9 drops them; exactness needs them.
        A: decay rates, (dt_heads,), < 0. S is the running sum of dt A.
        initial_state: the state before the prefix, (rows, state_heads, state_size, head_dim). Zeros when None.
        cu_seqlens: borders of packed prefixes, batch 1; one state per prefix.

    Returns:
        state (rows, state_heads, state_size, head_dim), fp32 (fp64 for fp64 inputs); state_heads = max(k_heads,
        v_heads, dt_heads).

    Raises:
        InputError: shapes, head counts, dtypes, devices or values that break the contract.

    Source: TransMamba (arXiv 2503.24067), eq. 7 to 9, with the step sizes of eq. 8 kept.
    """
    rows = None if cu_seqlens is None else len(cu_seqlens) - 1
    check_ssd_inputs("memory_converter", None, k, v, dt, A, state=initial_state, num_states=rows, validate=validate)
    borders = None if cu_seqlens is None else check_cu_seqlens("memory_converter", cu_seqlens, k.shape[0], k.shape[1])
    name = resolve_backend("memory_converter", backend, k, v)
    if name == "triton":
        from .triton import memory_converter_triton

        return memory_converter_triton(k, v, dt, A, initial_state=initial_state, cu_seqlens=borders)
    implementation = memory_converter_reference if name == "reference" else memory_converter_torch
    return implementation(k, v, dt, A, initial_state=initial_state, cu_seqlens=borders)
