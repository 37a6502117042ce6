"""softmax_attention: causal attention over whole, packed or cached sequences, in the ops' sequence-first layout."""

from collections.abc import Sequence

from torch import Tensor

from transmamba.errors import InputError
from transmamba.ops.backends import resolve_backend
from transmamba.ops.checks import check_cu_seqlens, check_finite, check_heads, check_tensors, values_are_checked

from .reference import softmax_attention_reference
from .torch import softmax_attention_torch

__all__ = ["softmax_attention", "softmax_attention_reference", "softmax_attention_torch"]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    query_lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    validate: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Return causal softmax(q k^T / sqrt(state_size)) v, (batch, queries, heads, head_dim).

    q (batch, queries, q_heads, state_size)    k (batch, keys, k_heads, state_size)
    v (batch, keys, v_heads, head_dim)

    The last query stands at the last key, so with fewer queries than keys the first keys are the past. cu_seqlens:
    borders of packed documents, batch 1, queries = keys. query_lengths and key_lengths: valid queries and keys of each
    row (right padded); outputs of padded queries are zero. Head counts as in ssd_scan. Raises InputError.
    """
    op = "softmax_attention"
    if any(x.dim() != 4 for x in (q, k, v)):
        raise InputError(
            f"{op}: q, k, v have shapes {[tuple(x.shape) for x in (q, k, v)]}; give (batch, seq_len, heads, dim)."
        )
    if q.shape[0] != k.shape[0] or k.shape[:2] != v.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise InputError(f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together.")
    if q.shape[1] > k.shape[1]:
        raise InputError(f"{op}: {q.shape[1]} queries but only {k.shape[1]} keys; every query needs its own key.")
    check_heads(op, q, k, v, None)
    check_tensors(op, {"q": q, "k": k, "v": v}, same_dtype=("q", "k", "v"))
    if validate and values_are_checked(q):
        check_finite(op, {"q": q, "k": k, "v": v})
    borders = None if cu_seqlens is None else check_cu_seqlens(op, cu_seqlens, q.shape[0], q.shape[1])
    if borders is not None and (q.shape[1] != k.shape[1] or query_lengths is not None or key_lengths is not None):
        raise InputError(
            f"{op}: cu_seqlens describes packed documents, which have a key for every query; pass no lengths."
        )
    _check_lengths(op, q, k, query_lengths, key_lengths)
    implementation = (
        softmax_attention_reference if resolve_backend(op, backend) == "reference" else softmax_attention_torch
    )
    return implementation(q, k, v, cu_seqlens=borders, query_lengths=query_lengths, key_lengths=key_lengths)


def _check_lengths(
    op: str, q: Tensor, k: Tensor, query_lengths: Sequence[int] | None, key_lengths: Sequence[int] | None
) -> None:
    """Raise unless every row has 0 <= queries <= keys, and no more of either than the tensors hold."""
    if query_lengths is None and key_lengths is None:
        return
    batch = q.shape[0]
    queries = [q.shape[1]] * batch if query_lengths is None else list(query_lengths)
    keys = [k.shape[1]] * batch if key_lengths is None else list(key_lengths)
    if len(queries) != batch or len(keys) != batch:
        raise InputError(f"{op}: {len(queries)} query_lengths and {len(keys)} key_lengths; give {batch}, one per row.")
    for row, (n_queries, n_keys) in enumerate(zip(queries, keys, strict=True)):
        if not (0 <= n_queries <= min(n_keys, q.shape[1]) and n_keys <= k.shape[1]):
            raise InputError(
                f"{op}: row {row} has {n_queries} queries and {n_keys} keys; "
                f"give 0 <= queries <= keys, at most {q.shape[1]} queries and {k.shape[1]} keys."
            )
