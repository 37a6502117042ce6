"""The bidirectional Mamba mixer of ViM and VideoMamba: two scans of one input, each with parameters of its own.

Notable: the gate acts on each direction before they are added. Parameters are named as in the published code, where
those of the backward direction end in _b. Channels stand last in memory throughout. Letters: b batch, l tokens, d
channels.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from transmamba.modules.conv import CausalConv1d
from transmamba.modules.plain import halves, is_plain, steps_and_bias
from transmamba.modules.scan_orders import REVERSED, DirectionOutput
from transmamba.ops import causal_conv1d, selective_scan


class BidirectionalMambaMixer(nn.Module):
    """hidden (batch, seq_len, hidden_size) -> (the same, each direction's output in its scan order).

    divide_outputs: the sum of the directions is halved before the output projection.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int,
        conv_kernel: int,
        expand: int,
        dt_rank: int,
        conv_bias: bool,
        bias: bool,
        divide_outputs: bool,
    ) -> None:
        super().__init__()
        channels = expand * hidden_size
        self.split_sizes = (dt_rank, state_size, state_size)
        self.divide_outputs = divide_outputs
        self.in_proj = nn.Linear(hidden_size, 2 * channels, bias=bias)
        self.conv1d = CausalConv1d(channels, channels, conv_kernel, groups=channels, bias=conv_bias)
        self.x_proj = nn.Linear(channels, dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(dt_rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, state_size))
        self.D = nn.Parameter(torch.empty(channels))
        self.conv1d_b = CausalConv1d(channels, channels, conv_kernel, groups=channels, bias=conv_bias)
        self.x_proj_b = nn.Linear(channels, dt_rank + 2 * state_size, bias=False)
        self.dt_proj_b = nn.Linear(dt_rank, channels)
        self.A_b_log = nn.Parameter(torch.empty(channels, state_size))
        self.D_b = nn.Parameter(torch.empty(channels))
        self.out_proj = nn.Linear(channels, hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, z = halves(self.in_proj, hidden)
        forward = self._scan(x, z, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        x, z = x.flip(1), z.flip(1)
        backward = self._scan(x, z, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        merged = forward + backward.flip(1)
        return self.out_proj(merged / 2 if self.divide_outputs else merged), (forward, backward)

    def _scan(
        self, x: Tensor, z: Tensor, conv: nn.Module, x_proj: nn.Module, dt_proj: nn.Module, A_log: Tensor, D: Tensor
    ) -> Tensor:
        """One direction's output, (b, l, d), from x and z in its order."""
        if is_plain(conv, CausalConv1d):
            u = causal_conv1d(x, conv.weight.squeeze(1), conv.bias, activation="silu", validate=False)
        else:  # adapters, hooks
            window = pad(x, (0, 0, self.conv1d.kernel_size[0] - 1, 0))
            u = silu(conv(window.transpose(1, 2)).transpose(1, 2))
        dt, B, C = x_proj(u).split(self.split_sizes, dim=-1)
        delta, bias = steps_and_bias(dt_proj, dt)
        u, delta, B, C, z = (given.transpose(1, 2) for given in (u, delta, B, C, z))
        A = -torch.exp(A_log.float())  # bf16 would move A by up to 0.8 %
        y = selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True, validate=False)
        return y.transpose(1, 2)


def both_directions(
    name: str, features: tuple[Tensor, Tensor], patches: Tensor, grid: tuple[int, ...]
) -> tuple[DirectionOutput, DirectionOutput]:
    """The two outputs of a mixer over a sequence of these patches in the scan order of this name, and its reverse."""
    backward = name.removesuffix(REVERSED) if name.endswith(REVERSED) else name + REVERSED
    return (
        DirectionOutput(name=name, features=features[0], patches=patches, grid=grid),
        DirectionOutput(name=backward, features=features[1], patches=_reversed(patches), grid=grid),
    )


@lru_cache(maxsize=16)  # the layers of a model share them
def _reversed(patches: Tensor) -> Tensor:
    return patches.flip(0)
