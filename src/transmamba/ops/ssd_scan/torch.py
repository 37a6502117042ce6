"""ssd_scan in plain PyTorch: chunks of the sequence as matrix products, a short recurrence between chunks.

Within a chunk of L tokens, with S the running sum of dt A:  y_i = exp(S_i) q_i^T h_in + sum_{j<=i} exp(S_i - S_j) dt_j
(q_i . k_j) v_j and h_out = exp(S_L) h_in + sum_j exp(S_L - S_j) dt_j k_j v_j^T. Derivation: docs/ops/ssd_scan.md.

Letters: m chunks (all rows or documents together), h heads, l tokens of a chunk, n state_size, p head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from transmamba.ops.chunks import ChunkGrid
from transmamba.ops.heads import accumulation_dtype, expand_heads, head_matmul, head_multiply
from transmamba.ops.ssd_step.torch import add_skip

CHUNK_SIZE = 64
# On a CPU, 32 is best overall for states of 32 x 32 to 64 x 64, and 64 for 128 x 64: docs/ops/ssd_scan.md, 2026-11-23.
SMALL_CHUNK_SIZE, SMALL_STATE = 32, 4096


def ssd_scan_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final state); see ssd_scan. chunk_size changes speed and rounding, not the result."""
    dtype = accumulation_dtype(k)
    if chunk_size is None:
        small = k.device.type == "cpu" and k.shape[3] * v.shape[3] <= SMALL_STATE
        chunk_size = SMALL_CHUNK_SIZE if small else CHUNK_SIZE
    grid = ChunkGrid.of(k.shape[0], k.shape[1], cu_seqlens, chunk_size, k.device)
    state_shape = (grid.num_rows, max(k.shape[2], v.shape[2], dt.shape[2]), k.shape[3], v.shape[3])
    if grid.num_chunks == 0:
        state = k.new_zeros(state_shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
        return expand_heads(v, max(q.shape[2], state_shape[1]), dim=2), state

    q_c, k_c, v_c = (grid.split(x.to(dtype)) for x in (q, k, v))
    dt_c = grid.split(dt.to(dtype).unsqueeze(-1), pad_with_zero=True).squeeze(-1)
    total = torch.cumsum(dt_c * A.to(dtype)[:, None], dim=-1)
    written = head_multiply(v_c, dt_c.unsqueeze(-1))

    to_end = torch.exp(total[..., -1:] - total)
    gathered = head_matmul(k_c.transpose(-1, -2), head_multiply(written, to_end.unsqueeze(-1)))
    entering, final_state = grid.recur(gathered, torch.exp(total[..., -1]), initial_state, state_shape)

    scores = head_multiply(head_matmul(q_c, k_c.transpose(-1, -2)), decay_matrix(total))
    y = head_matmul(scores, written)
    if initial_state is not None or grid.num_chunks > grid.num_first:
        from_start = expand_heads(torch.exp(total), y.shape[1], dim=1)
        y = torch.addcmul(y, head_matmul(q_c, entering), from_start.unsqueeze(-1))
    y = grid.join(y)
    if D is not None:
        y = add_skip(y, v, D)
    return y.to(v.dtype), final_state


def decay_matrix(total: Tensor) -> Tensor:
    """exp(S_i - S_j) for i >= j, else 0: (m, h, l) -> (m, h, l, l). Differences first, so nothing overflows."""
    length = total.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=total.device).triu(1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(future, -torch.inf).exp_()
