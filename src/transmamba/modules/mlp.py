"""Feed-forward blocks: SwiGLU (Shazeer 2020, arXiv 2002.05202), and the plain one of GPT-2."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from transmamba.modules.plain import is_plain
from transmamba.ops import gated_rms_norm
from transmamba.ops.precision import cast_once

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
        x = cast_once(x)
        if is_plain(self.act_fn, SILU):
            gate = self.gate_proj(x)
            return self.down_proj(gated_rms_norm(self.up_proj(x), gate, validate=False))
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    """down(act(up(x))). x (..., hidden_size)."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str, *, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))
