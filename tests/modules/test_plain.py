"""Modules that are no more than their weights go to ops; those that are more are called, and give the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import relative_rms_error
from tests.models.language_models import tiny_model, tokens
from transmamba.modules import BidirectionalMamba2Mixer, CausalConv1d
from transmamba.modules.mlp import SILU
from transmamba.modules.plain import halves, is_plain, steps_and_bias


def conv() -> CausalConv1d:
    return CausalConv1d(4, 4, 3, groups=4)


def pass_on(*_: Any) -> None:
    """A hook that changes nothing."""


class Packed(Tensor):
    """As quantisation makes of weights."""


def with_own_forward(module: CausalConv1d) -> None:
    module.forward = module.forward  # type: ignore[method-assign]  # what accelerate does


CHANGES: dict[str, Callable[[CausalConv1d], Any]] = {
    "forward hook": lambda module: module.register_forward_hook(pass_on),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(pass_on),
    "backward hook": lambda module: module.register_full_backward_hook(pass_on),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(pass_on),
    "parametrization": lambda module: nn.utils.parametrizations.weight_norm(module),
    "forward of its own": with_own_forward,
    "weight of another kind": lambda module: setattr(module, "weight", nn.Parameter(module.weight.as_subclass(Packed))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_module_is_not_plain(change: Callable[[CausalConv1d], Any]) -> None:
    module = conv()
    assert is_plain(module, CausalConv1d)
    assert not is_plain(module, nn.Conv1d)
    change(module)
    assert not is_plain(module, CausalConv1d)


def results(run: Callable[[], Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    y = run()
    found = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
    return [y, *(x for x in found if x is not None)]


def same_with_a_hook(model: nn.Module, run: Callable[[], Tensor]) -> None:
    parameters = list(model.parameters())
    before = results(run, parameters)
    called: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, (CausalConv1d, nn.RMSNorm, SILU)):
            module.register_forward_hook(lambda m, *_: called.append(m))
    after = results(run, parameters)
    assert any(isinstance(module, CausalConv1d) for module in called)
    assert any(isinstance(module, nn.RMSNorm) for module in called)
    assert len(before) == len(after) > 1
    assert max(relative_rms_error(a, b) for a, b in zip(before, after, strict=True)) < 1e-12  # fp64


@pytest.mark.parametrize("form", ["rectangular", "packed", "padded", "onto a cache"])
def test_the_language_model_computes_the_same_with_and_without_the_module(form: str) -> None:
    model, ids = tiny_model(torch.float64), tokens(2, 12)

    def run() -> Tensor:
        if form == "packed":
            return model(ids, cu_seqlens=[0, 3, 4, 13, 24], use_cache=False).logits
        if form == "padded":
            mask = torch.ones_like(ids)
            mask[1, :5] = 0
            return model(ids, attention_mask=mask, use_cache=False).logits
        if form == "onto a cache":
            cache = model.make_cache()
            pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 12))]
            return torch.cat(pieces, dim=1)
        return model(ids, use_cache=False).logits

    same_with_a_hook(model, run)


@pytest.mark.parametrize("activation", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("direction_weights", ["shared", "separate"])
def test_the_encoder_computes_the_same_with_and_without_the_module(direction_weights: str, activation: bool) -> None:
    mixer = BidirectionalMamba2Mixer(
        10,
        num_heads=3,
        head_dim=4,
        conv_kernel=3,
        conv_activation=activation,
        mean_term=True,
        direction_weights=direction_weights,
        use_gate=True,
        mixer_norm=True,
        norm_eps=1e-6,
    ).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    hidden = torch.randn(2, 7, 10, dtype=torch.float64)
    same_with_a_hook(mixer, lambda: mixer(hidden)[0])


@pytest.mark.parametrize("bias", [False, True])
def test_halves_and_steps_are_what_the_projections_give(bias: bool) -> None:
    """With a hook each projection is called as it is."""
    projection, x = torch.nn.Linear(6, 8, bias=bias, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    found = halves(projection, x)
    assert all(half.is_contiguous() for half in found)
    steps, added = steps_and_bias(projection, x)
    assert (added is projection.bias) if bias else (added is None)
    steps = steps if added is None else steps + added
    called = []
    projection.register_forward_hook(lambda *_: called.append(1))
    for new, old in zip(found, halves(projection, x), strict=True):
        assert torch.allclose(new, old, rtol=0, atol=1e-15)
    old, none = steps_and_bias(projection, x)
    assert none is None
    assert torch.allclose(steps, old, rtol=0, atol=1e-15)
    assert len(called) == 2
