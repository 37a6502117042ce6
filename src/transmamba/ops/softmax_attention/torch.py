"""softmax_attention through torch's scaled_dot_product_attention: documents of equal length share a call."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from transmamba.ops.heads import expand_heads
from transmamba.ops.recomputation import join, pick, recomputed, recomputed_like


def softmax_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Sequence[int] | None = None,
    query_lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Return the attention output; see softmax_attention."""
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    if q.shape[0] == 0 or q.shape[1] == 0:
        return expand_heads(v, heads, dim=2)[:, : q.shape[1]]
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        return _packed(q, k, v, tuple(cu_seqlens))
    if query_lengths is not None or key_lengths is not None:
        lengths = ([x.shape[1]] * x.shape[0] if n is None else n for x, n in ((q, query_lengths), (k, key_lengths)))
        return _ragged(q, k, v, *lengths)
    queries, keys = q.shape[1], k.shape[1]
    if queries == keys:
        return _attend(q, k, v, is_causal=queries > 1)
    if queries == 1:
        return _attend(q, k, v)
    positions = torch.arange(keys, device=q.device)
    return _attend(q, k, v, mask=positions <= positions[keys - queries :, None])


def _attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    grouped = q.shape[2] == heads and k.shape[2] == v.shape[2]
    if not grouped:
        q, k, v = (expand_heads(x, heads, dim=2) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    shared = k.shape[1] != heads
    if shared and not _reads_groups(q, k, v, mask, is_causal):
        k, v, shared = expand_heads(k, heads, dim=1), expand_heads(v, heads, dim=1), False
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=shared).transpose(1, 2)


def _reads_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    """Whether a fused kernel reads heads of keys and values that queries share; otherwise torch would, silently, make
    the whole matrix of weights, of which fp32, masks and GPUs without flash attention are cases.
    """
    if q.device.type != "cuda":
        return True
    if torch.compiler.is_compiling():
        return mask is None and q.dtype in (torch.bfloat16, torch.float16)
    call = SDPAParams(q, k, v, mask, 0.0, is_causal, True)
    return can_use_flash_attention(call) or can_use_cudnn_attention(call)


def _packed(q: Tensor, k: Tensor, v: Tensor, borders: tuple[int, ...]) -> Tensor:
    groups, inverse = _documents_by_length(borders, q.device, rounded=q.device.type != "cpu")
    with without_cudnn(q.device):
        parts = [
            _attend(*(recomputed_like(pick, x[0], group) for x in (q, k, v)), is_causal=group.shape[1] > 1).flatten(
                0, 1
            )
            for group in groups
        ]
    return recomputed(pick, recomputed(join, *parts, dim=0), inverse).unsqueeze(0)


def _ragged(q: Tensor, k: Tensor, v: Tensor, query_lengths: Sequence[int], key_lengths: Sequence[int]) -> Tensor:
    n_queries, n_keys = (torch.tensor(n, device=q.device)[:, None] for n in (query_lengths, key_lengths))
    query = torch.arange(q.shape[1], device=q.device)
    at = n_keys - n_queries + query  # the key each query stands at
    at = at.masked_fill(
        query >= n_queries, 0
    )  # a padded query reads key 0, so that no row is empty; its output is dropped
    mask = torch.arange(k.shape[1], device=q.device) <= at[..., None]
    y = _attend(q, k, v, mask=mask.unsqueeze(1))
    return y.masked_fill((query >= n_queries)[..., None, None], 0.0)


@lru_cache(maxsize=32)
def _documents_by_length(
    borders: tuple[int, ...], device: torch.device, *, rounded: bool
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Token indices of the documents of each length, (documents, length) each, and where every token went in them all.

    rounded: lengths are rounded up, for devices where many small calls cost more than some padding. Places behind a
    document's end repeat its last token, which no earlier query sees.
    """
    documents: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(borders):
        if end > start:
            length = _rounded_up(end - start) if rounded else end - start
            documents.setdefault(length, []).append((start, end))
    groups, places = [], []
    for length, spans in documents.items():
        first, last = torch.tensor(spans).unbind(1)
        index = first[:, None] + torch.arange(length)
        places.append((index < last[:, None]).flatten())
        groups.append(torch.minimum(index, last[:, None] - 1))
    tokens = torch.cat([group.flatten() for group in groups])
    inside = torch.cat(places)
    inverse = torch.empty(borders[-1], dtype=torch.int64)
    inverse[tokens[inside]] = inside.nonzero().flatten()
    return tuple(group.to(device) for group in groups), inverse.to(device)


def _rounded_up(length: int) -> int:
    """The next length worth a call of its own: four to an octave, so at most a quarter is padding."""
    step = max(16, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """Within, attention on a GPU leaves cuDNN out, which plans anew for every shape; for where shapes are many."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
