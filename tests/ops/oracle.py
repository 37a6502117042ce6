"""Both modes as explicit matrices, in fp64, sharing no code with the package; and ways to get them wrong.

Attention:   y_t = sum_{j<=t} softmax_j(q_t . k_j / sqrt(n)) v_j
SSM:         y_t = exp(S_t) q_t^T h_0 + sum_{j<=t} exp(S_t - S_j) dt_j (q_t . k_j) v_j + D v_t
             with S_t = sum_{i<=t} dt_i A
Hybrid:      where(t < P, attention, SSM), positions counted within the document.

FAULTS break the SSM everywhere, ATTENTION_FAULTS the attention. HAND_OVER_FAULTS break only what the Memory Converter
puts into the state, so they show after a TransPoint and nowhere else.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FAULTS = ("no decay", "no dt", "index shifted", "no skip", "heads in turn")
ATTENTION_FAULTS = ("no scale", "sees one ahead")
HAND_OVER_FAULTS = ("converter without dt", "converter index shifted", "rotated keys in the state")


def oracle_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    fault: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final state). A is (heads,), or has the shape of dt, so that each token's gradient is told apart."""
    if cu_seqlens is not None:
        parts = [
            oracle_scan(
                *(x[:, start:end] for x in (q, k, v, dt)),
                A if A.dim() == 1 else A[:, start:end],
                D,
                initial_state=None if initial_state is None else initial_state[i : i + 1],
                fault=fault,
            )
            for i, (start, end) in enumerate(pairwise(cu_seqlens))
        ]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([state for _, state in parts])
    state_heads = max(k.shape[2], v.shape[2], dt.shape[2])
    heads = max(q.shape[2], state_heads)
    y = _weights(q, k, dt, A, heads, fault) @ _per_head(v, heads, fault)
    k_h, v_h = _per_head(k, state_heads, fault), _per_head(v, state_heads, fault)
    S, step = _decay_and_step(dt, A, state_heads, fault)
    state = torch.zeros(k.shape[0], state_heads, k.shape[3], v.shape[3], dtype=torch.float64, device=k.device)
    if k.shape[1]:
        written = torch.exp(S[..., -1:] - S) * step
        state = (k_h * written.unsqueeze(-1)).transpose(-1, -2) @ v_h
    if initial_state is not None:
        h_0 = initial_state.double()
        to_output = _map(h_0, heads, 1, fault)
        S_y, _ = _decay_and_step(dt, A, heads, fault)
        y = y + torch.exp(S_y).unsqueeze(-1) * (_per_head(q, heads, fault) @ to_output)
        whole = S[..., -1] if k.shape[1] else S.sum(-1)
        state = state + torch.exp(whole)[..., None, None] * h_0
    if D is not None and fault != "no skip":
        y = y + D.double()[:, None, None] * _per_head(v, heads, fault)
    return y.transpose(1, 2), state


def oracle_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Sequence[int] | None = None, fault: str | None = None
) -> Tensor:
    """Return causal attention; with fewer queries than keys, the last query stands at the last key."""
    heads = max(x.shape[2] for x in (q, k, v))
    q_h, k_h, v_h = (_per_head(x, heads, fault) for x in (q, k, v))
    scores = q_h @ k_h.transpose(-1, -2)
    if fault != "no scale":
        scores = scores / q.shape[3] ** 0.5
    at = torch.arange(q.shape[1], device=q.device) + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1], device=q.device)
    seen = key <= at[:, None] + (1 if fault == "sees one ahead" else 0)
    if cu_seqlens is not None:
        document = _positions(cu_seqlens)[0].to(q.device)
        seen &= document[:, None] == document
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v_h).transpose(1, 2)


def oracle_hybrid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    trans_point: int | None,
    rotary: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Sequence[int] | None = None,
    fault: str | None = None,
) -> Tensor:
    """Return where(position < trans_point, attention, SSM), or what a faulty Memory Converter makes of it."""
    borders = [0, q.shape[1]] if cu_seqlens is None else list(cu_seqlens)
    parts = []
    for start, end in pairwise(borders):
        document = [x[:, start:end] for x in (q, k, v, dt)]
        if fault in HAND_OVER_FAULTS and trans_point is not None:
            parts.append(_scan_after_faulty_hand_over(*document, A, D, trans_point, _cut(rotary, start, end), fault))
        else:
            parts.append(oracle_scan(*document, A, D, fault=fault)[0])
    y_ssm = torch.cat(parts, dim=1)
    q_r, k_r = (q, k) if rotary is None else (rotate(x, rotary) for x in (q, k))
    y_attention = oracle_attention(q_r, k_r, v, cu_seqlens=borders, fault=fault)
    y_attention = _map(y_attention, y_ssm.shape[2], 2, fault)
    position = _positions(borders)[1].to(q.device)
    before = torch.ones_like(position, dtype=torch.bool) if trans_point is None else position < trans_point
    return torch.where(before[:, None, None], y_attention, y_ssm)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Multiply each pair (x_i, x_{i + n/2}) as a complex number by cos_i + i sin_i."""
    cos, sin = (table.double().unsqueeze(-2)[..., : x.shape[-1] // 2] for table in rotary)
    real, imaginary = x.double().chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)


def _scan_after_faulty_hand_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    trans_point: int,
    rotary: tuple[Tensor, Tensor] | None,
    fault: str,
) -> Tensor:
    """The SSM of one document whose suffix starts from a wrong state."""
    given = k
    if fault == "rotated keys in the state":
        assert rotary is not None
        given = rotate(k, rotary)
    wrong = {"converter without dt": "no dt", "converter index shifted": "index shifted"}.get(fault)
    prefix, suffix = slice(None, trans_point), slice(trans_point, None)
    _, state = oracle_scan(*(x[:, prefix] for x in (q, given, v, dt)), A, fault=wrong)
    y_prefix, _ = oracle_scan(*(x[:, prefix] for x in (q, k, v, dt)), A, D)
    y_suffix, _ = oracle_scan(*(x[:, suffix] for x in (q, k, v, dt)), A, D, initial_state=state)
    return torch.cat([y_prefix, y_suffix], dim=1)


def _weights(q: Tensor, k: Tensor, dt: Tensor, A: Tensor, heads: int, fault: str | None) -> Tensor:
    """What token j adds to the output of token t per unit of v_j, (batch, heads, t, j)."""
    S, step = _decay_and_step(dt, A, heads, fault)
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    decay = (S.unsqueeze(-1) - S.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
    return decay * step.unsqueeze(-2) * (_per_head(q, heads, fault) @ _per_head(k, heads, fault).transpose(-1, -2))


def _decay_and_step(dt: Tensor, A: Tensor, heads: int, fault: str | None) -> tuple[Tensor, Tensor]:
    """S and dt, each (batch, heads, seq_len)."""
    log_decay = dt.double() * A.double()
    S = log_decay.cumsum(1)
    if fault == "index shifted":  # h_t = a_{t-1} h_{t-1} + ..., as eq. 4 of the paper is printed
        S = S - log_decay
    if fault == "no decay":
        S = torch.zeros_like(S)
    step = torch.ones_like(S) if fault == "no dt" else dt.double()
    return tuple(_map(x, heads, 2, fault).transpose(1, 2) for x in (S, step))


def _per_head(x: Tensor, heads: int, fault: str | None) -> Tensor:
    return _map(x.double(), heads, 2, fault).transpose(1, 2)


def _map(x: Tensor, heads: int, dim: int, fault: str | None) -> Tensor:
    """Head h reads entry h * count // heads."""
    count = x.shape[dim]
    read = [h % count if fault == "heads in turn" else h * count // heads for h in range(heads)]
    return x.index_select(dim, torch.tensor(read, device=x.device))


def _positions(borders: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The document of every token, and its position therein."""
    lengths = [end - start for start, end in pairwise(borders)]
    document = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)], dtype=torch.long)
    position = torch.tensor([t for length in lengths for t in range(length)], dtype=torch.long)
    return document, position


def _cut(rotary: tuple[Tensor, Tensor] | None, start: int, end: int) -> tuple[Tensor, Tensor] | None:
    return None if rotary is None else (rotary[0][..., start:end, :], rotary[1][..., start:end, :])
