"""Feed-forward blocks: SwiGLU (Shazeer 2020, arXiv 2002.05202), and the plain one of GPT-2."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from transmamba.modules.plain import called_again, is_plain, product
from transmamba.ops import gated_rms_norm
from transmamba.ops.recomputation import cast_anew, recomputed

SILU = type(ACT2FN["silu"])


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)); hidden_act "silu" makes it SwiGLU. x (..., hidden_size)."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.hidden_act = hidden_act
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        x = cast_anew(x)
        if is_plain(self.act_fn, SILU):
            gate = product(self.gate_proj, x)
            return product(self.down_proj, recomputed(gated_rms_norm, product(self.up_proj, x), gate, validate=False))
        activated = called_again(self.act_fn, product(self.gate_proj, x))
        return product(self.down_proj, recomputed(torch.mul, activated, product(self.up_proj, x)))


class PlainMLP(nn.Module):
    """down(act(up(x))). x (..., hidden_size)."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, *, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        x = cast_anew(x)
        return product(self.down_proj, called_again(self.act_fn, product(self.up_proj, x)))
