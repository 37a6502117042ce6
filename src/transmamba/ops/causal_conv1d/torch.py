"""causal_conv1d in plain PyTorch: one multiply-add per tap over whole sequences.

Packed documents are parted by their own pasts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def causal_conv1d_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, final state); see causal_conv1d."""
    window = ConvWindow.of(x, weight.shape[1], initial_state, cu_seqlens)
    y = window.outputs(depthwise_valid(window.inputs, weight, bias))
    return torch.nn.functional.silu(y) if activation == "silu" else y, window.final_state()


def depthwise_valid(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution without padding: inputs (batch, kernel - 1 + t, channels), weight (channels, kernel) ->
    (batch, t, channels).
    """
    kernel = weight.shape[1]
    t = inputs.shape[1] - kernel + 1
    taps = weight.to(inputs.dtype).unbind(1)
    y = inputs[:, :t] * taps[0] if bias is None else torch.addcmul(bias.to(inputs.dtype), inputs[:, :t], taps[0])
    for i in range(1, kernel):
        y = torch.addcmul(y, inputs[:, i : i + t], taps[i])
    return y


@dataclass(frozen=True)
class ConvWindow:
    """What a valid convolution reads: every row's (document's) past, then its tokens."""

    inputs: (
        Tensor  # (batch, kernel - 1 + seq_len, channels), or (1, rows * (kernel - 1) + seq_len, channels) when packed
    )
    kernel: int
    index: "_PackedWindow | None"

    @staticmethod
    def of(x: Tensor, kernel: int, initial_state: Tensor | None, cu_seqlens: Sequence[int] | None) -> "ConvWindow":
        """Put the pasts before the tokens; initial_state (rows, kernel - 1, channels) or None for zeros."""
        if cu_seqlens is None:
            if initial_state is None:
                return ConvWindow(torch.nn.functional.pad(x, (0, 0, kernel - 1, 0)), kernel, None)
            return ConvWindow(torch.cat([initial_state.to(x.dtype), x], dim=1), kernel, None)
        index = _packed_window(tuple(cu_seqlens), kernel, x.device)
        past = x.new_zeros(1, x.shape[2]) if initial_state is None else initial_state.to(x.dtype).flatten(0, 1)
        source = index.source_of_zeros if initial_state is None else index.source
        return ConvWindow(torch.cat([x[0], past])[source].unsqueeze(0), kernel, index)

    def outputs(self, y: Tensor) -> Tensor:
        """Pick the tokens' outputs from those of the valid convolution."""
        return y if self.index is None else y[:, self.index.tokens]

    def final_state(self, length: int | None = None) -> Tensor:
        """The last `length` (kernel - 1) inputs of each row, (rows, length, channels); the past counts as input."""
        length = self.kernel - 1 if length is None else length
        if self.index is None:
            return self.inputs[:, self.inputs.shape[1] - length :]
        assert length == self.kernel - 1
        return self.inputs[0][self.index.tails]


@dataclass(frozen=True)
class _PackedWindow:
    source: Tensor  # into cat(tokens, pasts)
    source_of_zeros: Tensor  # into cat(tokens, one row of zeros)
    tokens: Tensor  # (seq_len,): each token's output
    tails: Tensor  # (rows, kernel - 1): each row's last inputs


@lru_cache(maxsize=32)
def _packed_window(borders: tuple[int, ...], kernel: int, device: torch.device) -> _PackedWindow:
    starts, lengths, past = np.asarray(borders[:-1]), np.diff(np.asarray(borders)), kernel - 1
    rows, seq_len = len(lengths), borders[-1]
    first = starts + past * np.arange(rows)  # where each row's past begins in the window
    source = np.empty(seq_len + rows * past, dtype=np.int64)
    pasts = first[:, None] + np.arange(past)
    source[pasts] = seq_len + np.arange(rows * past).reshape(rows, past)
    tokens = np.arange(seq_len) + np.repeat(past * np.arange(rows), lengths)
    source[tokens + past] = np.arange(seq_len)
    ends = first + past + lengths
    tails = ends[:, None] - past + np.arange(past)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)

    return _PackedWindow(tensor(source), tensor(np.minimum(source, seq_len)), tensor(tokens), tensor(tails))
