"""memory_converter on a GPU: the pass of ssd_scan that carries states, without outputs."""

from collections.abc import Sequence

from torch import Tensor

from transmamba.ops.ssd_scan.triton import memory_converter_op


def memory_converter_triton(
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Return the state after the prefix; see memory_converter."""
    return memory_converter_op(k, v, dt, A, initial_state, None if cu_seqlens is None else list(cu_seqlens))
