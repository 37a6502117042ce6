"""The TransMamba mixer: one set of projections, read as Q, K, V before the TransPoint and as C, B, x after it (arXiv
2503.24067, eq. 1 to 6).

Notable: convolution and SiLU act on q, k and v in both modes, before the split; the gate z acts on the SSM's output
only; rotary embedding acts inside softmax only (ssm_rope=False), so the state reads un-rotated keys; projections are
always called as modules, and so is a convolution that is more than its weights. Letters: P the TransPoint, S state
heads, n state_size = head_dim, p head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from transmamba.errors import CacheError
from transmamba.modules.cache import TransMambaLayerCache
from transmamba.modules.conv import CausalConv1d
from transmamba.modules.layout import TokenLayout
from transmamba.modules.plain import gated_norm, is_plain, product
from transmamba.ops import (
    apply_rotary,
    causal_conv1d,
    gated_rms_norm,
    hybrid_mixer,
    memory_converter,
    softmax_attention,
    ssd_scan,
    ssd_step,
)
from transmamba.ops.causal_conv1d.torch import ConvWindow
from transmamba.ops.recomputation import cast_anew, is_recomputing, join, pick, recomputed
from transmamba.ops.rotary import rotate, undo_rotary


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """What one mixer is made of.

    has_attention, has_ssm: the modes it owns parameters for. attention_output_bias: None = as attention_bias. qk_norm:
    an RMSNorm of every head's q and k, in both modes. rotary: whether this layer has rotary embedding at all.
    gate_bias: of z_proj.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_state_heads: int
    head_dim: int
    conv_kernel: int
    conv_bias: bool
    attention_bias: bool
    use_gate: bool
    mode_norm: bool
    ssm_rope: bool
    rms_norm_eps: float
    attention_output_bias: bool | None = None
    qk_norm: bool = False
    rotary: bool = True
    gate_bias: bool = False
    has_attention: bool = True
    has_ssm: bool = True


# Parameters that only the state space reads; everything else belongs to both modes or to attention.
SSM_PARAMETERS = ("dt_proj.weight", "dt_bias", "A_log", "D", "z_proj.weight", "z_proj.bias", "ssm_norm.weight")


@dataclass(frozen=True)
class RotaryTables:
    """cos and sin at this call's positions, (1 or batch, seq_len, head_dim), and at all before for keys handed over."""

    cos: Tensor
    sin: Tensor
    past_cos: Tensor | None = None  # (1, positions, head_dim); None where the frequencies depend on the length
    past_sin: Tensor | None = None


class TransMambaMixer(nn.Module):
    """Softmax attention up to position P, a Mamba-2 state space after it. hidden (batch, seq_len, hidden_size)."""

    def __init__(self, config: MixerConfig, trans_point: int | None) -> None:
        super().__init__()
        self.config = config
        self.trans_point = trans_point
        c, width, kv_width = (
            config,
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.split_sizes = (width, kv_width, kv_width)
        self.q_proj = nn.Linear(c.hidden_size, width, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_width, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_width, bias=c.attention_bias)
        output_bias = c.attention_bias if c.attention_output_bias is None else c.attention_output_bias
        self.o_proj = nn.Linear(width, c.hidden_size, bias=output_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps) if c.qk_norm else None
        channels = sum(self.split_sizes)
        self.conv1d = (
            CausalConv1d(channels, channels, c.conv_kernel, groups=channels, bias=c.conv_bias)
            if c.conv_kernel
            else None
        )
        if c.has_ssm:
            self.dt_proj = nn.Linear(c.hidden_size, c.num_state_heads, bias=False)
            self.dt_bias = nn.Parameter(torch.empty(c.num_state_heads))
            self.A_log = nn.Parameter(torch.empty(c.num_state_heads))
            self.D = nn.Parameter(torch.empty(c.num_attention_heads))
            self.z_proj = nn.Linear(c.hidden_size, width, bias=c.gate_bias) if c.use_gate else None
        if c.mode_norm:
            self.attention_norm = nn.RMSNorm(width, eps=c.rms_norm_eps) if c.has_attention else None
            self.ssm_norm = nn.RMSNorm(width, eps=c.rms_norm_eps) if c.has_ssm else None

    def forward(
        self,
        hidden: Tensor,
        rotary: RotaryTables | None,
        layout: TokenLayout,
        cache: TransMambaLayerCache | None = None,
        rewind: int = 0,
    ) -> Tensor:
        """Mix tokens along the sequence; with a cache, go on from it and leave it at the last token."""
        hidden = cast_anew(hidden)
        q, k, v = self.project(hidden, layout, cache, rewind)
        if rotary is None or not self.config.rotary:
            rotary = None
        elif self.config.ssm_rope:
            q, k = (rotate(x, rotary.cos, rotary.sin) for x in (q, k))
            rotary = None
        y = self._mix(q, k, v, hidden, rotary, layout, cache)
        return product(self.o_proj, self._finish(y.flatten(-2), hidden, layout))

    def project(
        self, hidden: Tensor, layout: TokenLayout, cache: TransMambaLayerCache | None = None, rewind: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, (..., heads, head_dim) each, as both modes read them, before any rotation."""
        qkv = [product(projection, hidden) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        if self.conv1d is not None:
            if cache is None and is_plain(self.conv1d, CausalConv1d):
                qkv = self._convolve_each(qkv, layout)
            else:
                joined = self._convolve(torch.cat(qkv, dim=-1), layout, cache, rewind)
                qkv = list(joined.split(self.split_sizes, dim=-1))
        q, k, v = (x.unflatten(-1, (-1, self.config.head_dim)) for x in qkv)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def step_sizes(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return dt = softplus(dt_proj(hidden) + dt_bias), (..., S), and A = -exp(A_log), (S,)."""
        # fp32: in bf16 A would move by up to 0.8 % (A_log of 1 to 16) and long sums of dt A would drift.
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return softplus(self.dt_proj(hidden).to(dtype) + self.dt_bias.to(dtype)), -self.A_log.to(dtype).exp()

    def _convolve_each(self, qkv: list[Tensor], layout: TokenLayout) -> list[Tensor]:
        """Channels do not meet in the convolution, so q, k and v are neither joined for it nor parted after it."""
        assert self.conv1d is not None
        weights = self.conv1d.weight.squeeze(1).split(self.split_sizes)
        biases = [None] * 3 if self.conv1d.bias is None else self.conv1d.bias.split(self.split_sizes)
        return [
            recomputed(causal_conv1d, x, weight, bias, activation="silu", cu_seqlens=layout.borders, validate=False)
            for x, weight, bias in zip(qkv, weights, biases, strict=True)
        ]

    def _convolve(self, qkv: Tensor, layout: TokenLayout, cache: TransMambaLayerCache | None, rewind: int) -> Tensor:
        assert self.conv1d is not None
        past_length = self.config.conv_kernel - 1
        kept = None if cache is None else cache.conv
        past = None if kept is None else kept[:, kept.shape[1] - past_length :]
        if is_plain(self.conv1d, CausalConv1d):
            y, state = causal_conv1d(
                qkv,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                activation="silu",
                initial_state=past,
                cu_seqlens=layout.borders,
                return_final_state=True,
                validate=False,
            )
        else:
            window = ConvWindow.of(qkv, past_length + 1, past, layout.borders)
            y = silu(window.outputs(self.conv1d(window.inputs.transpose(1, 2)).transpose(1, 2)))
            state = window.final_state()
        if cache is not None:
            if layout.rectangular and rewind:
                length = past_length + rewind
                before = qkv.new_zeros(len(qkv), past_length, qkv.shape[2]) if kept is None else kept
                state = torch.cat([before, qkv[:, -length:]], dim=1)[:, -length:]
            cache.conv = state.clone()  # a view would keep the whole prompt alive
        return y

    def _mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor,
        rotary: RotaryTables | None,
        layout: TokenLayout,
        cache: TransMambaLayerCache | None,
    ) -> Tensor:
        rope = None if rotary is None else (rotary.cos, rotary.sin)
        if not self.config.has_ssm and cache is None:
            q, k = (q, k) if rope is None else (rotate(x, *rope) for x in (q, k))
            return softmax_attention(q, k, v, cu_seqlens=layout.borders, validate=False)
        dt, A = self.step_sizes(hidden) if self.config.has_ssm else (None, None)
        if cache is not None:
            return self._mix_onto_cache(q, k, v, dt, A, rotary, layout, cache)
        assert dt is not None
        assert A is not None
        return hybrid_mixer(
            q, k, v, dt, A, self.D, trans_point=self.trans_point, rotary=rope, cu_seqlens=layout.borders, validate=False
        )

    def _mix_onto_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dt: Tensor | None,
        A: Tensor | None,
        rotary: RotaryTables | None,
        layout: TokenLayout,
        cache: TransMambaLayerCache,
    ) -> Tensor:
        if q.numel() == 0:
            return q
        point, batch = self.trans_point, len(layout.lengths)
        rope = None if rotary is None else (rotary.cos, rotary.sin)
        if layout.uniform_past == 0 and point is not None and point < layout.seq_len:
            assert dt is not None
            assert A is not None
            y, state = hybrid_mixer(
                q, k, v, dt, A, self.D, trans_point=point, rotary=rope, return_final_state=True, validate=False
            )
            cache.store_state(range(batch), state, batch)
            return y
        if layout.rectangular and (point is None or layout.longest <= point):
            q_r, k_r = (q, k) if rope is None else (apply_rotary(x, *rope) for x in (q, k))
            return self._attend(q_r, k_r, v, dt, range(batch), layout.lengths, cache, batch)
        if layout.rectangular and point is not None and min(layout.pasts) >= point:
            self._hand_over(cache.before_switch(range(batch)), A, rotary, cache, batch)
            return self._scan(q, k, v, dt, A, range(batch), cache, batch)

        plan = layout.plan(point)
        q_r, k_r = (q, k) if rope is None else (apply_rotary(x, *rope) for x in (q, k))
        shape = q.shape[:2]
        y = torch.zeros(shape[0] * shape[1], *q.shape[2:], dtype=q.dtype, device=q.device)
        chosen = plan.attention
        if chosen.documents:
            q_r, k_r, picked_v = (x.flatten(0, 1)[chosen.index] for x in (q_r, k_r, v))
            picked_dt = None if dt is None else dt.flatten(0, 1)[chosen.index]
            out = self._attend(q_r, k_r, picked_v, picked_dt, chosen.documents, chosen.lengths, cache, batch)
            out = out.flatten(0, 1) if chosen.inside is None else out[chosen.inside]
            y = y.index_copy(0, chosen.flat_index, out)
        chosen = plan.ssm
        if chosen.documents:
            self._hand_over(cache.before_switch(chosen.documents), A, rotary, cache, batch)
            assert dt is not None
            index, borders = (
                (chosen.index, None) if chosen.inside is None else (chosen.flat_index[None], chosen.borders)
            )
            q, k, v, dt = (x.flatten(0, 1)[index] for x in (q, k, v, dt))
            out = self._scan(q, k, v, dt, A, chosen.documents, cache, batch, borders=borders)
            y = y.index_copy(0, chosen.flat_index, out.flatten(0, 1))
        return y.unflatten(0, shape)

    def _attend(
        self,
        q_r: Tensor,
        k_r: Tensor,
        v: Tensor,
        dt: Tensor | None,
        rows: Sequence[int],
        lengths: Sequence[int],
        cache: TransMambaLayerCache,
        batch: int,
    ) -> Tensor:
        """Attend from the new tokens of these rows, (rows, max length, heads, head_dim), to all of theirs."""
        cache.append(rows, lengths, k_r, v, dt if self.trans_point is not None else None, batch)
        keys, values, _, key_lengths = cache.read(rows)
        ragged = len(set(lengths)) > 1 or len(set(key_lengths)) > 1
        return softmax_attention(
            q_r,
            keys,
            values,
            query_lengths=lengths if ragged else None,
            key_lengths=key_lengths if ragged else None,
            validate=False,
        )

    def _hand_over(
        self,
        crossing: tuple[int, ...],
        A: Tensor | None,
        rotary: RotaryTables | None,
        cache: TransMambaLayerCache,
        batch: int,
    ) -> None:
        """The Memory Converter: the cached prefix of every row that crosses its TransPoint now becomes its state."""
        if not crossing:
            return
        keys, values, dt, _ = cache.read(crossing)
        assert dt is not None
        assert A is not None
        if rotary is not None:
            if rotary.past_cos is None or rotary.past_sin is None:
                raise CacheError(
                    "this rope_type changes its frequencies with the length, so cached keys cannot be handed to the "
                    "state; use another rope_type, or set the TransPoints to None or 0."
                )
            length = keys.shape[1]
            keys = undo_rotary(keys, rotary.past_cos[:, :length], rotary.past_sin[:, :length])
            values = values.to(keys.dtype)
        cache.store_state(crossing, memory_converter(keys, values, dt, A, validate=False), batch)
        cache.free(crossing)

    def _scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dt: Tensor | None,
        A: Tensor | None,
        rows: Sequence[int],
        cache: TransMambaLayerCache,
        batch: int,
        *,
        borders: Sequence[int] | None = None,
    ) -> Tensor:
        """Go on from the states of these rows; tokens (rows, length, ...), or (1, tokens, ...) with their borders."""
        assert dt is not None
        assert A is not None
        state = cache.state
        if state is not None and len(rows) < batch:
            state = state[torch.tensor(rows, device=state.device)]
        if borders is None and q.shape[1] == 1 and state is not None:
            y, state = ssd_step(state, q[:, 0], k[:, 0], v[:, 0], dt[:, 0], A, self.D, validate=False)
            y = y.unsqueeze(1)
        else:
            y, state = ssd_scan(
                q, k, v, dt, A, self.D, initial_state=state, cu_seqlens=borders, return_final_state=True, validate=False
            )
        cache.store_state(rows, state, batch)
        return y

    def _finish(self, y: Tensor, hidden: Tensor, layout: TokenLayout) -> Tensor:
        """Gate the SSM's outputs, and normalise each mode by itself where mode_norm asks for it.

        y (batch, seq_len, width).
        """
        c = self.config
        if not c.mode_norm and not (c.use_gate and c.has_ssm):
            return y
        if self.trans_point is None or self.trans_point >= layout.longest:
            return self._finish_attention(y)
        if all(past >= self.trans_point for past in layout.pasts):
            return self._finish_ssm(y, hidden)
        if layout.uniform_past is not None:
            cut = self.trans_point - layout.uniform_past
            if not c.mode_norm and self.z_proj is not None:
                return recomputed(gated_rms_norm, y, self._gate(hidden[:, cut:]), start=cut, validate=False)
            before, after = y.split((cut, y.shape[1] - cut), dim=1)  # slices' gradients would be whole tensors of zeros
            before, after = self._finish_attention(before), self._finish_ssm(after, hidden[:, cut:])
            return recomputed(join, before, after, dim=1)
        plan = layout.plan(self.trans_point)
        flat, hidden = y.flatten(0, 1), hidden.flatten(0, 1)
        index = plan.ssm.flat_index
        ssm = self._finish_ssm(recomputed(pick, flat, index), recomputed(pick, hidden, index))
        finished = recomputed(torch.index_copy, flat, 0, index, ssm)
        if c.mode_norm:
            index = plan.attention.flat_index
            attention = self._finish_attention(recomputed(pick, flat, index))
            finished = recomputed(torch.index_copy, finished, 0, index, attention)
        return finished.unflatten(0, y.shape[:2])

    def _finish_attention(self, y: Tensor) -> Tensor:
        return self.attention_norm(y) if self.config.mode_norm and self.attention_norm is not None else y

    def _finish_ssm(self, y: Tensor, hidden: Tensor) -> Tensor:
        norm = self.ssm_norm if self.config.mode_norm else None
        if self.z_proj is None:
            return y if norm is None else norm(y)
        return gated_norm(y, self._gate(hidden), norm)

    def _gate(self, hidden: Tensor) -> Tensor:
        """z of these tokens: one product, whose result and whose copy of some tokens backward makes again."""
        assert self.z_proj is not None
        if not is_recomputing() or not is_plain(self.z_proj, nn.Linear):
            return self.z_proj(hidden)
        return recomputed(partial(product, self.z_proj), recomputed(Tensor.contiguous, hidden))
