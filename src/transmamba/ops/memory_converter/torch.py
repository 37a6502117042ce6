"""memory_converter in plain PyTorch: one weighted product (K * w)^T V, or chunks of it when prefixes are packed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from transmamba.ops.chunks import ChunkGrid
from transmamba.ops.heads import accumulation_dtype, head_matmul, head_multiply

CHUNK_SIZE = 128


def memory_converter_torch(
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    A: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Return the state after the prefix; see memory_converter."""
    dtype = accumulation_dtype(k)
    # A dense prefix is one chunk of any length: remaining decay is summed from the end, where it matters, so length
    # costs no precision.
    chunk_size = CHUNK_SIZE if cu_seqlens is not None else max(1, k.shape[1])
    grid = ChunkGrid.of(k.shape[0], k.shape[1], cu_seqlens, chunk_size, k.device)
    state_shape = (grid.num_rows, max(k.shape[2], v.shape[2], dt.shape[2]), k.shape[3], v.shape[3])
    if grid.num_chunks == 0:
        return k.new_zeros(state_shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    k_c, v_c = grid.split(k.to(dtype)), grid.split(v.to(dtype))
    dt_c = grid.split(dt.to(dtype).unsqueeze(-1), pad_with_zero=True).squeeze(-1)
    log_decay = dt_c * A.to(dtype)[:, None]
    from_here = log_decay.flip(-1).cumsum(-1).flip(-1)
    after = torch.nn.functional.pad(from_here[..., 1:], (0, 1))
    written = head_multiply(v_c, (dt_c * torch.exp(after)).unsqueeze(-1))
    gathered = head_matmul(k_c.transpose(-1, -2), written)
    return grid.recur(gathered, torch.exp(from_here[..., 0]), initial_state, state_shape)[1]
