"""The mixer of PlainMamba (arXiv 2403.17695): one set of parameters, four snakes over the image.

Notable, as published: only the inputs are put in scan order, so step t of a scan takes its dt, B and C from patch t of
the raster; B gets a learned vector for the move that leads to the step; dt_proj's bias is added twice, by the
projection and by the scan; the gate acts after the directions are added. Channels stand last in memory throughout, so
that nothing is transposed and patches are gathered as whole rows of channels.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from transmamba.modules.plain import halves, steps_and_bias
from transmamba.modules.scan_orders import NUM_MOVES, DirectionOutput, scan_orders
from transmamba.ops import begin_scans, merge_scans, selective_scan


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
        x, z = halves(self.in_proj, hidden)
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)
        x = silu(self.conv2d(image)).permute(0, 2, 3, 1).flatten(1, 2)
        dt, B, C = self.x_proj(x).split(self.split_sizes, dim=-1)
        orders = scan_orders(self.scan_orders, grid, x.device)
        count = len(orders.orders)
        moves = (orders.moves().to(self.direction_Bs.dtype) @ self.direction_Bs).to(B.dtype)
        delta, bias = steps_and_bias(self.dt_proj, dt)
        u = begin_scans(x, orders.places, validate=False)
        delta = begin_scans(delta, orders.places, in_order=False, validate=False)
        B, C = B + moves.unsqueeze(1), C.expand(count, *C.shape)
        u, delta, B, C = (y.flatten(0, 1).transpose(1, 2) for y in (u, delta, B, C))
        y = selective_scan(  # one row per direction and image
            u,
            delta,
            -torch.exp(self.A_log.float()),  # bf16 would move A by up to 0.8 %
            B,
            C,
            self.D,
            delta_bias=self.dt_proj.bias if bias is None else 2 * bias,
            delta_softplus=True,
            validate=False,
        )
        merged, y = merge_scans(y.transpose(1, 2).unflatten(0, (count, len(hidden))), orders.places, z, validate=False)
        directions = tuple(
            DirectionOutput(name=order.name, features=one, patches=order.order, grid=grid, every=y)
            for order, one in zip(orders.orders, y.unbind(), strict=True)
        )
        return self.out_proj(merged), directions
