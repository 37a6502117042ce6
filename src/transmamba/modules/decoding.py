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
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from transmamba.modules.mixer import TransMambaMixer
from transmamba.modules.mlp import GatedMLP, PlainMLP
from transmamba.modules.static_cache import LayerMode, StaticLayer
from transmamba.ops import apply_rotary, attention_step, conv_ssd_step, memory_converter, ssd_step, step_linear
from transmamba.ops.conv_ssd_step import ring_convolution
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


def mixer_step(
    mixer: TransMambaMixer, norm: nn.Module, hidden: Tensor, place: StepPlace, layer: StaticLayer, mode: LayerMode
) -> Tensor:
    """hidden + mixer(norm(hidden)) of one token of every row, (rows, hidden_size), onto its cached past."""
    c = mixer.config
    projections = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
    if layer.trans_point is not None:
        projections.append(mixer.dt_proj)
        if mode is not LayerMode.ATTENTION and mixer.z_proj is not None:
            projections.append(mixer.z_proj)
    q, k, v, *rest = products(hidden, projections, norm)
    dt, z = [*rest, None, None][:2]
    # Compared only where both modes occur: it is a kernel, which would stand between two that overlap.
    before = None
    if mode is LayerMode.MIXED and layer.trans_point is not None:
        before = (place.positions < layer.trans_point)[:, None]
    if mode is LayerMode.SSM or (mode is LayerMode.MIXED and is_fusable(mixer)):
        assert dt is not None
        y = after_switch(mixer, q, k, v, dt, z, place, layer)
        if mode is LayerMode.SSM:
            return product(y, mixer.o_proj, mixer.ssm_norm if c.mode_norm else None, hidden)
        y = mixer.ssm_norm(y) if c.mode_norm and mixer.ssm_norm is not None else y
        assert before is not None
        y = torch.where(before, before_switch(mixer, q, k, v, dt, place, layer), y)
        return product(y, mixer.o_proj, None, hidden)
    y = before_switch(mixer, q, k, v, dt, place, layer)
    if mode is LayerMode.MIXED:
        assert dt is not None
        assert before is not None
        y_ssm = after_switch(mixer, q, k, v, dt, z, place, layer)
        y = torch.where(before, y, mixer.ssm_norm(y_ssm) if c.mode_norm and mixer.ssm_norm is not None else y_ssm)
    return product(y, mixer.o_proj, None, hidden)


def is_fusable(mixer: TransMambaMixer) -> bool:
    """Whether the state space reads what the convolution gives, so that one kernel does it all."""
    return mixer.q_norm is None and not mixer.config.ssm_rope


def before_switch(
    mixer: TransMambaMixer, q: Tensor, k: Tensor, v: Tensor, dt: Tensor | None, place: StepPlace, layer: StaticLayer
) -> Tensor:
    """Attention's output of the token, (rows, width), from its projections."""
    q, k, v = project_step(mixer, q, k, v, place, layer)
    if not mixer.config.ssm_rope:
        q, k = rotate(mixer, q, k, place)
    steps = None if dt is None else softplus(dt.to(mixer_dtype(dt)) + mixer.dt_bias.to(mixer_dtype(dt)))
    return mixer._finish_attention(attend_step(q, k, v, steps, place, layer))


def after_switch(
    mixer: TransMambaMixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    z: Tensor | None,
    place: StepPlace,
    layer: StaticLayer,
) -> Tensor:
    """The state space's gated output of the token, (rows, width), from its projections; states advance in place. What
    rows before their TransPoint do to a state does not matter: it is replaced when they cross.
    """
    assert layer.state is not None
    weight = None if mixer.conv1d is None else mixer.conv1d.weight[:, 0]
    bias = None if mixer.conv1d is None else mixer.conv1d.bias
    if is_fusable(mixer):
        return conv_ssd_step(
            layer.state,
            layer.conv,
            place.positions,
            q,
            k,
            v,
            dt,
            z,
            weight=weight,
            bias=bias,
            dt_bias=mixer.dt_bias,
            A_log=mixer.A_log,
            D=mixer.D,
        )
    q, k, v = project_step(mixer, q, k, v, place, layer)
    dtype = mixer_dtype(dt)
    steps, A = softplus(dt.to(dtype) + mixer.dt_bias.to(dtype)), -mixer.A_log.to(dtype).exp()
    y, _ = ssd_step(layer.state, q, k, v, steps, A, mixer.D, in_place=True, validate=False)
    return y.flatten(-2) if z is None else y.flatten(-2) * silu(z)


def project_step(
    mixer: TransMambaMixer, q: Tensor, k: Tensor, v: Tensor, place: StepPlace, layer: StaticLayer
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as heads, (rows, heads, head_dim) each, convolved and normed; rotated where both modes do so."""
    if mixer.conv1d is not None:
        assert layer.conv is not None
        weight, bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
        q, k, v = ring_convolution(layer.conv, place.positions, (q, k, v), weight, bias)
    q, k, v = (x.unflatten(-1, (-1, mixer.config.head_dim)) for x in (q, k, v))
    if mixer.q_norm is not None and mixer.k_norm is not None:
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    if mixer.config.ssm_rope:
        q, k = rotate(mixer, q, k, place)
    return q, k, v


def rotate(mixer: TransMambaMixer, q: Tensor, k: Tensor, place: StepPlace) -> tuple[Tensor, Tensor]:
    if not mixer.config.rotary or place.cos is None or place.sin is None:
        return q, k
    cos, sin = place.cos, place.sin
    return apply_rotary(q[:, None], cos, sin)[:, 0], apply_rotary(k[:, None], cos, sin)[:, 0]


def mlp_step(mlp: GatedMLP | PlainMLP, norm: nn.Module, hidden: Tensor) -> Tensor:
    """hidden + mlp(norm(hidden)), (rows, hidden_size)."""
    biases = [module.bias for module in mlp.children() if isinstance(module, nn.Linear)]
    if type(mlp) is not GatedMLP or mlp.hidden_act != "silu" or any(bias is not None for bias in biases):
        return hidden + mlp(norm(hidden))
    scale, eps, hidden_in = scale_of(norm, hidden)
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight]
    (inner,) = step_linear(hidden_in, weights, norm_weight=scale, eps=eps, gated=True)
    return product(inner, mlp.down_proj, None, hidden)


def products(hidden: Tensor, modules: Sequence[nn.Linear], norm: nn.Module | None) -> tuple[Tensor, ...]:
    """module(norm(hidden)) of every module, in one kernel where rows are few."""
    if any(module.bias is not None for module in modules):
        normed = hidden if norm is None else norm(hidden)
        return tuple(module(normed) for module in modules)
    scale, eps, given = scale_of(norm, hidden)
    return step_linear(given, [module.weight for module in modules], norm_weight=scale, eps=eps)


def product(y: Tensor, module: nn.Linear, norm: nn.Module | None, residual: Tensor) -> Tensor:
    """residual + module(norm(y))."""
    if module.bias is not None:
        return residual + module(y if norm is None else norm(y))
    scale, eps, given = scale_of(norm, y)
    return step_linear(given, [module.weight], norm_weight=scale, eps=eps, residual=residual)[0]


def scale_of(norm: nn.Module | None, hidden: Tensor) -> tuple[Tensor | None, float, Tensor]:
    """Weight and eps of an RMS norm with what it is still to be applied to; other norms are applied here."""
    if isinstance(norm, nn.RMSNorm) and norm.eps is not None:
        return norm.weight, norm.eps, hidden
    return None, 1e-6, hidden if norm is None else norm(hidden)


def mixer_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
