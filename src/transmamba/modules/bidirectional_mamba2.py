"""A bidirectional Mamba-2 mixer for encoders: two scans of one input, in attention's letters.

Notable: q, k and v are attention's projections read as C, B and x, so a Transformer's weights fit, with attention's
scale of 1 / sqrt(p). The mean term is one more channel of the state, 1 in q and m in k, so that token j counts m_j +
q_t k_j / sqrt(p) for token t: softmax's weights to first order. Both directions run as the two halves of the heads of
one scan; the gate and the norm act on their sum. Rows end in padding if they are shorter than the batch: each row is
turned around within its own tokens, so padding comes last in both directions and no token reads it. Parameters of the
backward direction end in _b. Without gradients, where there are kernels for it, the projections are one product and all
between them and o_proj is one op. Letters: b batch, l tokens, h heads, p head_dim, the state size without the mean
term.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu, softplus

from transmamba.modules.conv import CausalConv1d
from transmamba.modules.plain import gated_norm, is_plain
from transmamba.ops import bidirectional_scan, causal_conv1d, ssd_scan
from transmamba.ops.bidirectional_scan import runs_as_kernels
from transmamba.ops.turning import turn

DIRECTION_WEIGHTS = ("shared", "separate")
BACKWARD = "_b"
# A row of the joint projection begins at multiples of so many numbers, which GPUs load in one piece.
ALIGNED = 16


class BidirectionalMamba2Mixer(nn.Module):
    """hidden (batch, seq_len, hidden_size) -> (the same, each direction's output in its scan order).

    direction_weights: "shared" = q, k, v and the convolution serve both directions, which differ in step size, decay
    and D; "separate" = each direction has all of its own. conv_kernel: 0 = none. mean_term: see above.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        conv_kernel: int,
        conv_activation: bool,
        mean_term: bool,
        direction_weights: str,
        use_gate: bool,
        mixer_norm: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.head_dim = head_dim
        self.conv_activation = conv_activation
        self.mean_term = mean_term
        self.is_separate = direction_weights == "separate"
        for ending in ("", BACKWARD) if self.is_separate else ("",):
            for name in ("q_proj", "k_proj", "v_proj"):
                self.add_module(name + ending, nn.Linear(hidden_size, width))
            conv = CausalConv1d(3 * width, 3 * width, conv_kernel, groups=3 * width) if conv_kernel else None
            self.add_module("conv1d" + ending, conv)
            if mean_term:
                self.add_module("mean_proj" + ending, nn.Linear(hidden_size, num_heads))
        for ending in ("", BACKWARD):
            self.add_module("dt_proj" + ending, nn.Linear(hidden_size, num_heads, bias=False))
            for name in ("dt_bias", "A_log", "D"):
                self.register_parameter(name + ending, nn.Parameter(torch.empty(num_heads)))
        self.z_proj = nn.Linear(hidden_size, width) if use_gate else None
        self.norm = nn.RMSNorm(width, eps=norm_eps) if mixer_norm else None
        self.o_proj = nn.Linear(width, hidden_size)

    def forward(
        self, hidden: Tensor, turned: Tensor | None = None, lengths: Tensor | None = None, *, directions: bool = True
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """turned (batch, seq_len): for each row, where the scan from its last token backward is at every step; None =
        no row has padding. lengths (batch,): how many tokens each row has, of which `turned` was made. Outputs of
        directions are (batch, seq_len, heads * head_dim); None without `directions`, which saves making them.
        """
        if not directions and (turned is None) == (lengths is None) and self._is_one_op(hidden):
            return self.o_proj(self._at_once(hidden, lengths)), None
        forward, backward = self._inputs(hidden, turned)
        q, k, v, dt = (torch.cat(pair, dim=2) for pair in zip(forward, backward, strict=True))
        # fp32: in bf16 A would move by up to 0.8 % (A_log of 1 to 16).
        A = -torch.exp(self._both("A_log").to(dt.dtype))
        y = ssd_scan(q, k, v, dt, A, self._both("D"), validate=False)
        y_f, y_b = (half.flatten(2) for half in y.chunk(2, dim=2))
        return self.o_proj(self._finish(y_f + turn(y_b, turned), hidden)), (y_f, y_b)

    def _is_one_op(self, hidden: Tensor) -> bool:
        """Whether the op computes what the modules would, and is the faster form here."""
        if torch.is_grad_enabled() or self.is_separate:
            return False
        conv = self._convolution()
        if not runs_as_kernels(hidden, self.head_dim, 1 if conv is None else conv.kernel_size[0]):
            return False
        if conv is not None and not is_plain(conv, CausalConv1d):
            return False
        return all(module is None or is_plain(module, nn.Linear) for module in self._joined())

    def _convolution(self) -> CausalConv1d | None:
        """That of the forward direction."""
        found: CausalConv1d | None = getattr(self, "conv1d", None)
        return found

    def _joined(self) -> list[nn.Linear | None]:
        """Everything that reads the input, in the order of the joint projection; steps begin at an aligned column."""
        names = ("q_proj", "k_proj", "v_proj", "z_proj", "dt_proj", "dt_proj" + BACKWARD, "mean_proj")
        return [getattr(self, name, None) for name in names]

    def _at_once(self, hidden: Tensor, lengths: Tensor | None) -> Tensor:
        """What o_proj reads, by one product and one op."""
        modules = [module for module in self._joined() if module is not None]
        weights = [module.weight for module in modules]
        sizes = [weight.shape[0] for weight in weights]
        rest = -sum(sizes) % ALIGNED
        weight = torch.cat([*weights, weights[0][:rest]])  # the last columns are not read
        zeros = weight.new_zeros(max(*sizes, rest))
        biases = [zeros[:size] if m.bias is None else m.bias for m, size in zip(modules, sizes, strict=True)]
        width, heads = sizes[0], self.get_parameter("D").shape[0]
        joint = linear(hidden, weight, torch.cat([*biases, zeros[:rest]]))
        gates, means = width if self.z_proj is not None else 0, heads if self.mean_term else 0
        q, k, v, gate, dt, m, _ = joint.split([width, width, width, gates, 2 * heads, means, rest], dim=-1)
        conv = self._convolution()
        y = bidirectional_scan(
            q,
            k,
            v,
            dt,
            dt_bias=self._pair("dt_bias"),
            A_log=self._pair("A_log"),
            D=self._pair("D"),
            m=m if means else None,
            gate=gate if gates and self.norm is None else None,
            weight=None if conv is None else conv.weight.squeeze(1),
            bias=None if conv is None else conv.bias,
            activation="silu" if self.conv_activation else None,
            lengths=lengths,
            validate=False,
        )
        if self.norm is None:
            return y
        return self.norm(y.to(self.norm.weight.dtype)) if not gates else gated_norm(y, gate, self.norm)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A parameter of the forward direction, and of the backward one."""
        return self.get_parameter(name), self.get_parameter(name + BACKWARD)

    def _inputs(self, hidden: Tensor, turned: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """q, k, v (b, l, h, p or p + 1) and dt (b, l, h) of both directions, each in its order."""
        first = self._project(hidden, "")
        own = BACKWARD if self.is_separate else ""
        second = self._project(hidden, own) if own else first
        forward = self._scanned(first, self._steps(hidden, ""), "", "")
        backward = self._scanned(
            [turn(x, turned) for x in second], turn(self._steps(hidden, BACKWARD), turned), own, BACKWARD
        )
        return forward, backward

    def _both(self, name: str) -> Tensor:
        """A parameter of the forward heads, then of the backward ones."""
        return torch.cat(self._pair(name))

    def _steps(self, hidden: Tensor, ending: str) -> Tensor:
        """dt before its bias and softplus, (b, l, h)."""
        return self.get_submodule("dt_proj" + ending)(hidden)

    def _project(self, hidden: Tensor, own: str) -> list[Tensor]:
        """q, k, v, (b, l, h p) each, and m, (b, l, h)."""
        names = ("q_proj", "k_proj", "v_proj", *(("mean_proj",) if self.mean_term else ()))
        return [self.get_submodule(name + own)(hidden) for name in names]

    def _scanned(self, projected: list[Tensor], dt_raw: Tensor, own: str, ending: str) -> tuple[Tensor, ...]:
        """What a direction scans; projected and dt_raw in its order."""
        heads = dt_raw.shape[-1]
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in self._convolve(projected[:3], own))
        q = q * self.head_dim**-0.5
        if self.mean_term:
            m = projected[3][..., None]
            q, k = torch.cat([q, torch.ones_like(m)], dim=-1), torch.cat([k, m], dim=-1)
        dtype = torch.promote_types(dt_raw.dtype, torch.float32)  # sums of dt A drift in 16 bits
        return q, k, v, softplus(dt_raw.to(dtype) + self.get_parameter("dt_bias" + ending).to(dtype))

    def _convolve(self, qkv: list[Tensor], own: str) -> Iterable[Tensor]:
        """q, k and v in a direction's order after the convolution and SiLU, where the mixer has them."""
        conv: CausalConv1d | None = getattr(self, "conv1d" + own)
        if is_plain(conv, CausalConv1d):
            assert conv.bias is not None
            weights, width = conv.weight.squeeze(1), qkv[0].shape[-1]
            parts = zip(qkv, weights.split(width), conv.bias.split(width), strict=True)
            return [
                causal_conv1d(*part, activation="silu" if self.conv_activation else None, validate=False)
                for part in parts
            ]
        if conv is not None:  # adapters, hooks
            joined = pad(torch.cat(qkv, dim=-1), (0, 0, conv.kernel_size[0] - 1, 0))
            qkv = list(conv(joined.transpose(1, 2)).transpose(1, 2).chunk(3, dim=-1))
        return [silu(x) for x in qkv] if self.conv_activation else qkv

    def _finish(self, y: Tensor, hidden: Tensor) -> Tensor:
        if self.z_proj is not None:
            return gated_norm(y, self.z_proj(hidden), self.norm)
        return y if self.norm is None else self.norm(y.to(self.norm.weight.dtype))
