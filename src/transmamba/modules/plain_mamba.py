"""The mixer of PlainMamba (arXiv 2403.17695): one set of parameters, four snakes over the image.

Notable, as published: only the inputs are put in scan order, so step t of a scan takes its dt, B and C from patch t of
the raster; B gets a learned vector for the move that leads to the step; dt_proj's bias is added twice, by the
projection and by the scan; the gate acts after the directions are added. Channels stand last in memory throughout, so
that nothing is transposed and patches are gathered as whole rows of channels.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from transmamba.modules.scan_orders import NUM_MOVES, DirectionOutput, scan_orders
from transmamba.ops import selective_scan


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
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)
        x = silu(self.conv2d(image)).permute(0, 2, 3, 1).flatten(1, 2)
        dt, B, C = self.x_proj(x).split(self.split_sizes, dim=-1)
        orders = scan_orders(self.scan_orders, grid, x.device)
        count = len(orders.orders)
        moves = (orders.moves().to(self.direction_Bs.dtype) @ self.direction_Bs).to(B.dtype)
        u, delta, C = orders.scan(x, 1), _for_each(count, self.dt_proj(dt)), _for_each(count, C)
        u, delta, B, C = (y.flatten(0, 1).transpose(1, 2) for y in (u, delta, B.unsqueeze(1) + moves, C))
        y = selective_scan(  # one row per image and direction
            u,
            delta,
            -torch.exp(self.A_log.float()),  # bf16 would move A by up to 0.8 %
            B,
            C,
            self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            validate=False,
        )
        y = y.transpose(1, 2).unflatten(0, (len(hidden), count))
        merged = orders.merge(y, 1)
        directions = tuple(
            DirectionOutput(name=order.name, features=one, patches=order.order, grid=grid)
            for order, one in zip(orders.orders, y.unbind(1), strict=True)
        )
        return self.out_proj(merged * silu(z)), directions


def _for_each(count: int, x: Tensor) -> Tensor:
    """(batch, ...) -> (batch, count, ...)."""
    return x.unsqueeze(1).expand(-1, count, *x.shape[1:])
