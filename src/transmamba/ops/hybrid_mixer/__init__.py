"""hybrid_mixer: softmax attention before the TransPoint, the state space from it on, on the same q, k and v."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_cu_seqlens, check_ssd_inputs, check_tensors, check_trans_point
from transmamba.ops.precision import outside_autocast

from .reference import hybrid_mixer_reference
from .torch import hybrid_mixer_torch

__all__ = ["hybrid_mixer", "hybrid_mixer_reference", "hybrid_mixer_torch"]


@overload
def hybrid_mixer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    trans_point: int | None,
    rotary: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_state: Literal[False] = False,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor: ...
@overload
def hybrid_mixer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    trans_point: int | None,
    rotary: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_state: Literal[True],
    validate: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@outside_autocast
def hybrid_mixer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    trans_point: int | None,
    rotary: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    return_final_state: bool = False,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return where(position < trans_point, causal softmax attention, SSM) on shared q, k, v.

    Args:
        q, k, v, dt, A, D: as in ssd_scan.
        trans_point: the position, counted within the document, of the first token of the SSM; None = never switch.
        rotary: (cos, sin), each (seq_len, state_size) or (batch, seq_len, state_size); applied inside softmax only. The
            state and the SSM read un-rotated q and k. To use rotary embedding in both modes, rotate q and k before the
            call and pass None.
        cu_seqlens: borders of packed documents, [0, ..., seq_len], batch 1.
        return_final_state: also return the SSM state after each row's (document's) last token, whichever mode it ended
            in.

    Returns:
        y (batch, seq_len, heads, head_dim) in v's dtype; with return_final_state, (y, state (rows, state_heads,
        state_size, head_dim)).

    Raises:
        InputError: shapes, head counts, dtypes, devices or values that break the contract.

    Source: TransMamba (arXiv 2503.24067), eq. 1 to 6; docs/ops/hybrid_mixer.md.
    """
    op = "hybrid_mixer"
    check_trans_point(op, trans_point)
    check_ssd_inputs(op, q, k, v, dt, A, D, validate=validate)
    if rotary is not None:
        if len(rotary) != 2:
            raise InputError(f"{op}: rotary has {len(rotary)} entries; give two, (cos, sin).")
        check_tensors(op, {"q": q, "cos": rotary[0], "sin": rotary[1]})
        for name, x in zip(("cos", "sin"), rotary, strict=True):
            if (
                x.dim() not in (2, 3)
                or x.shape[-2:] != (q.shape[1], q.shape[3])
                or (x.dim() == 3 and x.shape[0] not in (1, q.shape[0]))
            ):
                raise InputError(
                    f"{op}: rotary's {name} has shape {tuple(x.shape)}; give (seq_len, state_size) = "
                    f"{(q.shape[1], q.shape[3])}, with or without a leading batch."
                )
        if q.shape[3] % 2:
            raise InputError(
                f"{op}: rotary embedding needs an even state_size, and it is {q.shape[3]}; pass rotary=None."
            )
    borders = None if cu_seqlens is None else check_cu_seqlens(op, cu_seqlens, q.shape[0], q.shape[1])
    name = resolve_backend(op, backend, k, v)
    implementation = hybrid_mixer_reference if name == "reference" else hybrid_mixer_torch
    if name == "triton":
        from .triton import hybrid_mixer_triton as implementation
    y, state = implementation(
        q,
        k,
        v,
        dt,
        A,
        D,
        trans_point=trans_point,
        rotary=rotary,
        cu_seqlens=borders,
        return_final_state=return_final_state,
    )
    if not return_final_state:
        return y
    assert state is not None
    return y, state
