"""The specification of memory_converter: the state that the recurrence itself arrives at."""

from collections.abc import Sequence

from torch import Tensor

from transmamba.ops.ssd_scan.reference import ssd_scan_reference


def memory_converter_reference(
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Return the state after the prefix; see memory_converter."""
    return ssd_scan_reference(k, k, v, dt, A, initial_state=initial_state, cu_seqlens=cu_seqlens)[1]
