"""The mixer of VMamba (arXiv 2401.10166), SS2D: rows and columns, both ways, each with a state space of its own.

Notable: channels stand last in memory throughout, which is the published code's channel-first form in another layout;
each patch is projected where it lies, and the few numbers are put in order; the directions are groups of one scan and
their parameters are stacked, named as published.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from transmamba.modules.scan_orders import CROSS_SCAN_ORDERS, DirectionOutput, scan_orders
from transmamba.ops import selective_scan


class CrossScanMixer(nn.Module):
    """hidden (batch, height, width, hidden_size) -> (the same, each direction's output before the merge).

    use_gate: the merged and normalised output is multiplied by SiLU(z).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        state_size: int,
        conv_kernel: int,
        expand: float,
        dt_rank: int,
        conv_bias: bool,
        bias: bool,
        use_gate: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        channels, directions = int(expand * hidden_size), len(CROSS_SCAN_ORDERS)
        self.split_sizes = (dt_rank, state_size, state_size)
        self.use_gate = use_gate
        self.in_proj = nn.Linear(hidden_size, channels * (2 if use_gate else 1), bias=bias)
        self.conv2d = nn.Conv2d(
            channels, channels, conv_kernel, padding=(conv_kernel - 1) // 2, groups=channels, bias=conv_bias
        )
        self.x_proj_weight = nn.Parameter(torch.empty(directions, dt_rank + 2 * state_size, channels))
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, channels, dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(directions, channels))
        self.A_logs = nn.Parameter(torch.empty(directions * channels, state_size))
        self.Ds = nn.Parameter(torch.empty(directions * channels))
        self.out_norm = nn.LayerNorm(channels, eps=norm_eps)
        self.out_proj = nn.Linear(channels, hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, tuple[DirectionOutput, ...]]:
        x = self.in_proj(hidden)
        z = None
        if self.use_gate:
            x, z = x.chunk(2, dim=-1)
        x = silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        grid, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        orders = scan_orders(CROSS_SCAN_ORDERS, grid, x.device)
        count = len(orders.orders)
        projected = orders.arrange(linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(2, (count, -1)))
        dt, B, C = projected.split(self.split_sizes, dim=-1)
        delta = linear(dt.flatten(2), torch.block_diag(*self.dt_projs_weight))  # one product, whose output is in order
        y = selective_scan(
            orders.scan(x, 2).flatten(2).transpose(1, 2),
            delta.transpose(1, 2),
            -torch.exp(self.A_logs.float()),  # bf16 would move A by up to 0.8 %
            B.permute(0, 2, 3, 1),
            C.permute(0, 2, 3, 1),
            self.Ds,
            delta_bias=self.dt_projs_bias.flatten(),
            delta_softplus=True,
            validate=False,
        )
        y = y.transpose(1, 2).unflatten(2, (count, -1))
        out = self.out_norm(orders.merge(y, 2).unflatten(1, grid))
        directions = tuple(
            DirectionOutput(name=order.name, features=one, patches=order.order, grid=grid)
            for order, one in zip(orders.orders, y.unbind(2), strict=True)
        )
        return self.out_proj(out if z is None else out * silu(z)), directions
