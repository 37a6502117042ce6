"""The mixer of PlainMamba (arXiv 2403.17695): one set of parameters, four snakes over the image.

Notable, as published: only the inputs are put in scan order, so step t of a scan takes its dt, B and C from patch t of
the raster; B gets a learned vector for the move that leads to the step; dt_proj's bias is added twice, by the
projection and by the scan; the gate acts after the directions are added.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from transmamba.modules.scan_orders import DirectionOutput, scan_orders
from transmamba.ops import selective_scan

NUM_MOVES = 5  # the start, and four directions


class PlainMambaMixer(nn.Module):
    """hidden (batch, patches, hidden_size) in raster order -> (the same, each direction's output before the merge).

    scan_orders: names of orders without jumps.
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
        scan_orders: tuple[str, ...],
    ) -> None:
        super().__init__()
        channels = expand * hidden_size
        self.split_sizes = (dt_rank, state_size, state_size)
        self.scan_orders = scan_orders
        self.in_proj = nn.Linear(hidden_size, 2 * channels, bias=bias)
        self.conv2d = nn.Conv2d(
            channels, channels, conv_kernel, padding=conv_kernel // 2, groups=channels, bias=conv_bias
        )
        self.x_proj = nn.Linear(channels, dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(dt_rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, state_size))
        self.D = nn.Parameter(torch.empty(channels))
        self.direction_Bs = nn.Parameter(torch.empty(NUM_MOVES, state_size))
        self.out_proj = nn.Linear(channels, hidden_size, bias=bias)

    def forward(self, hidden: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[DirectionOutput, ...]]:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        image = x.transpose(1, 2).unflatten(2, grid)
        x = silu(self.conv2d(image)).flatten(2)
        dt, B, C = self.x_proj(x.transpose(1, 2)).split(self.split_sizes, dim=-1)
        delta, B, C = (y.transpose(1, 2) for y in (self.dt_proj(dt), B, C))
        orders = scan_orders(self.scan_orders, grid, x.device)
        count = len(orders.orders)
        moves = self.direction_Bs[orders.moves()].unflatten(0, (count, 1, -1)).transpose(2, 3).to(B.dtype)
        y = selective_scan(  # one row per direction and image
            orders.scan(x).permute(2, 0, 1, 3).flatten(0, 1),
            delta.repeat(count, 1, 1),
            -torch.exp(self.A_log.float()),  # bf16 would move A by up to 0.8 %
            (B + moves).flatten(0, 1),
            C.repeat(count, 1, 1),
            self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            validate=False,
        ).unflatten(0, (count, -1))
        merged = orders.merge(y.permute(1, 2, 0, 3))
        directions = tuple(
            DirectionOutput(name=order.name, features=one.transpose(1, 2), patches=order.order, grid=grid)
            for order, one in zip(orders.orders, y.unbind(), strict=True)
        )
        return self.out_proj(merged.transpose(1, 2) * silu(z)), directions
