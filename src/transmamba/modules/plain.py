"""Which modules an op may stand for: those that are no more than their class and their weights."""

from typing import TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from transmamba.ops import gated_rms_norm, post_norm, residual_norm
from transmamba.ops.precision import autocast_dtype, cast_once
from transmamba.ops.recomputation import cast_anew, is_recomputing, recomputed

M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module | None, kind: type[M]) -> TypeGuard[M]:
    """Whether a module is exactly its class and weights, so that an op may compute what a call of it would.

    Not so: adapters and parametrizations, which change its class; hooks, and a forward of its own, as accelerate sets
    it; weights of a subclass of Tensor, as quantisation leaves them.
    """
    if module is None or type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return False
    return all(weight is None or type(weight) in (Tensor, nn.Parameter) for weight in module._parameters.values())


def product(projection: nn.Module, x: Tensor) -> Tensor:
    """projection(x); within `recomputing`, autocast's cast of a plain projection's weight is not kept."""
    if not is_recomputing() or not is_plain(projection, nn.Linear):
        return cast(Tensor, projection(x))
    return linear(x, cast_anew(projection.weight), projection.bias)


def called_again(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), which backward computes again within `recomputing`, where the module is plain and has one input."""
    return recomputed(module, x) if is_plain(module, type(module)) else cast(Tensor, module(x))


def gated_norm(y: Tensor, gate: Tensor, norm: nn.Module | None) -> Tensor:
    """norm(y silu(gate)), in one op where the norm is plain; y and gate (..., size)."""
    if is_plain(norm, nn.RMSNorm) and norm.eps is not None:
        return recomputed(gated_rms_norm, y, gate, norm.weight, eps=norm.eps, validate=False)
    y = recomputed(gated_rms_norm, y, gate, validate=False)
    return y if norm is None else norm(y)


def normed_and_residual(norm: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(hidden), hidden), the first as products would cast it; in one op where the norm is plain."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    if hidden.dtype == weight.dtype and weight.dim() == 1:
        dtype = autocast_dtype(hidden) or hidden.dtype
        if is_plain(norm, nn.LayerNorm):
            return residual_norm(hidden, weight, norm.bias, eps=norm.eps, dtype=dtype, validate=False)
        if is_plain(norm, nn.RMSNorm) and norm.eps is not None:
            return residual_norm(hidden, weight, eps=norm.eps, centred=False, dtype=dtype, validate=False)
    return norm(hidden.to(weight.dtype)), hidden


def norm_of_sum(norm: nn.Module, hidden: Tensor, branch: Tensor) -> Tensor:
    """norm(hidden + branch); in one op where the norm is plain."""
    if is_plain(norm, nn.LayerNorm) and norm.weight.dim() == 1:
        weight = norm.weight
        if torch.promote_types(hidden.dtype, branch.dtype) == weight.dtype:
            return post_norm(hidden, branch, weight, norm.bias, eps=norm.eps, validate=False)
    return norm(hidden + branch)


def halves(projection: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """projection(hidden) cut in two along the last dimension; each half is dense where the projection is plain."""
    if not is_plain(projection, nn.Linear):
        first, second = projection(hidden).chunk(2, dim=-1)
        return first, second
    hidden = cast_once(hidden)
    weights = cast_once(projection.weight).chunk(2)
    biases = (None, None) if projection.bias is None else cast_once(projection.bias).chunk(2)
    return linear(hidden, weights[0], biases[0]), linear(hidden, weights[1], biases[1])


def steps_and_bias(dt_proj: nn.Module, dt: Tensor) -> tuple[Tensor, Tensor | None]:
    """dt_proj(dt), and None; or the product alone and the bias, which a scan adds in fp32 and sums the gradient of."""
    if is_plain(dt_proj, nn.Linear) and dt_proj.bias is not None:
        return linear(dt, dt_proj.weight), dt_proj.bias
    return dt_proj(dt), None
