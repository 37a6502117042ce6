"""One token of the TransMamba mixer onto a static cache: the same function of the document as `forward`, without a host
that waits and without shapes that change.

A row's mode follows from its position, which the device knows; which modes occur in a step, the host knows. Where both
occur, both are computed and each row takes its own. Keys of a row become its state before the step in which it crosses
its TransPoint, by the Memory Converter: to carry a state along from the first token would move 8 state_size head_dim
bytes per head and token, against 2 (state_size + head_dim) for reading 16-bit keys and values once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from transmamba.modules.mixer import TransMambaMixer
from transmamba.modules.static_cache import LayerMode, StaticLayer
from transmamba.ops import apply_rotary, attention_step, memory_converter, ssd_step
from transmamba.ops.causal_conv1d import depthwise_valid
from transmamba.ops.rotary import undo_rotary


@dataclass(frozen=True, kw_only=True)
class StepPlace:
    """Where the rows of a step stand.

    positions: (rows,), on the device. places: how many stored keys the longest row may have, a bound for all layers.
    cos, sin: (rows, 1, head_dim) at these positions; None where no layer of the step rotates.
    """

    positions: Tensor
    places: int
    cos: Tensor | None = None
    sin: Tensor | None = None


def mixer_step(mixer: TransMambaMixer, hidden: Tensor, place: StepPlace, layer: StaticLayer, mode: LayerMode) -> Tensor:
    """Mix one token of every row into its cached past; hidden (rows, hidden_size), and the same is returned."""
    config = mixer.config
    q, k, v = project_step(mixer, hidden, place.positions, layer)
    rotates = config.rotary and place.cos is not None and place.sin is not None
    q_r, k_r = q, k
    if rotates and (config.ssm_rope or mode is not LayerMode.SSM):
        assert place.cos is not None
        assert place.sin is not None
        q_r, k_r = (apply_rotary(x[:, None], place.cos, place.sin)[:, 0] for x in (q, k))
    if config.ssm_rope:
        q, k = q_r, k_r
    dt, A = mixer.step_sizes(hidden) if layer.trans_point is not None else (None, None)
    if mode is LayerMode.ATTENTION:
        return mixer.o_proj(mixer._finish_attention(attend_step(q_r, k_r, v, dt, place, layer)))
    assert dt is not None
    assert A is not None
    y = mixer._finish_ssm(scan_step(q, k, v, dt, A, mixer.D, layer), hidden)
    if mode is LayerMode.MIXED:
        assert layer.trans_point is not None
        before = (place.positions < layer.trans_point)[:, None]
        y = torch.where(before, mixer._finish_attention(attend_step(q_r, k_r, v, dt, place, layer)), y)
    return mixer.o_proj(y)


def project_step(
    mixer: TransMambaMixer, hidden: Tensor, positions: Tensor, layer: StaticLayer
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the token, (rows, heads, head_dim) each, before any rotation."""
    qkv = torch.cat([mixer.q_proj(hidden), mixer.k_proj(hidden), mixer.v_proj(hidden)], dim=-1)
    if mixer.conv1d is not None:
        assert layer.conv is not None
        slots, kernel = layer.conv.shape[1], mixer.config.conv_kernel
        rows = torch.arange(len(qkv), device=qkv.device)
        layer.conv[rows, positions % slots] = qkv
        taps = positions[:, None] + torch.arange(1 - kernel, 1, device=qkv.device)
        window = layer.conv[rows[:, None], taps % slots]
        qkv = silu(depthwise_valid(window, mixer.conv1d.weight[:, 0], mixer.conv1d.bias)[:, 0])
    q, k, v = (x.unflatten(-1, (-1, mixer.config.head_dim)) for x in qkv.split(mixer.split_sizes, dim=-1))
    if mixer.q_norm is not None and mixer.k_norm is not None:
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    return q, k, v


def attend_step(q_r: Tensor, k_r: Tensor, v: Tensor, dt: Tensor | None, place: StepPlace, layer: StaticLayer) -> Tensor:
    """Store the token's key and value and attend to all of its row's, (rows, width).

    Rows behind their TransPoint write to the last place, which nobody reads any more.
    """
    assert layer.keys is not None
    assert layer.values is not None
    rows = torch.arange(len(q_r), device=q_r.device)
    at = place.positions.clamp(max=layer.keys.shape[1] - 1)
    layer.keys[rows, at], layer.values[rows, at] = k_r.to(layer.keys.dtype), v
    if layer.dt is not None and dt is not None:
        layer.dt[rows, at] = dt
    places = min(place.places, layer.keys.shape[1])
    return attention_step(q_r, layer.keys[:, :places], layer.values[:, :places], at + 1).flatten(-2)


def scan_step(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor, layer: StaticLayer) -> Tensor:
    """Advance the states in place and read them out, (rows, width). What rows before their TransPoint do to a state
    does not matter: it is replaced when they cross.
    """
    assert layer.state is not None
    y, _ = ssd_step(layer.state, q, k, v, dt, A, D, in_place=True, validate=False)
    return y.flatten(-2)


def hand_over(
    mixer: TransMambaMixer, layer: StaticLayer, rows: Sequence[int], rotary: tuple[Tensor, Tensor] | None
) -> None:
    """The Memory Converter: stored prefixes of these rows become their states.

    rotary: cos and sin, (1, trans_point, head_dim), where keys are stored rotated and the state reads them unrotated.
    """
    assert layer.keys is not None
    assert layer.values is not None
    assert layer.dt is not None
    assert layer.state is not None
    index = torch.tensor(rows, device=layer.keys.device)
    keys, values, dt = (x.index_select(0, index) for x in (layer.keys, layer.values, layer.dt))
    if rotary is not None:
        keys = undo_rotary(keys, *rotary)
        values = values.to(keys.dtype)
    A = -mixer.A_log.to(dt.dtype).exp()
    layer.state.index_copy_(0, index, memory_converter(keys, values, dt, A, validate=False))
