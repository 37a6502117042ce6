"""Weights of layers: far layers count more, all stay finite, and nothing is learnt through them."""

import pytest
import torch

from transmamba.distillation import LAYER_WEIGHTS, layer_weights
from transmamba.errors import InputError


def test_the_ratio_is_the_mean_cosine_over_each() -> None:
    c = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
    weights = layer_weights(c)
    assert weights.sum().item() == pytest.approx(3)
    assert (weights[0] / weights[2]).item() == pytest.approx(3)  # inverse to the cosines
    assert weights[0] > weights[1] > weights[2]


def test_other_forms() -> None:
    c = torch.tensor([0.9, 0.1, 0.5, 0.5], dtype=torch.float64)
    assert torch.equal(layer_weights(c, "uniform"), torch.ones(4, dtype=torch.float64))
    assert layer_weights(c, "linear").tolist() == pytest.approx([0.4, 0.8, 1.2, 1.6])
    soft = layer_weights(c, "softmax", temperature=0.4)
    assert (soft[1] / soft[0]).log().item() == pytest.approx(0.8 / 0.4)
    assert soft.mean().item() == pytest.approx(1)


# Specification, section 7, check 8.
@pytest.mark.parametrize("form", LAYER_WEIGHTS)
@pytest.mark.parametrize("cosines", [[-1.0, -0.2, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, -1.0], [0.3]], ids=str)
def test_weights_are_finite_and_positive_whatever_the_cosines(form: str, cosines: list[float]) -> None:
    weights = layer_weights(torch.tensor(cosines), form)
    assert weights.isfinite().all()
    assert (weights > 0).all()
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    raw = torch.tensor(cosines)
    unclamped = raw.mean() / raw
    if min(cosines) <= 0:
        assert not (unclamped.isfinite().all() and (unclamped > 0).all())  # what clamping is for


@pytest.mark.parametrize("form", LAYER_WEIGHTS)
def test_no_gradient_passes_through_weights(form: str) -> None:
    c = torch.tensor([0.2, 0.9], requires_grad=True)
    weights = layer_weights(c, form)
    assert not weights.requires_grad
    torch.sum(weights * (1 - c)).backward()
    assert (c.grad < 0).all()  # descent raises every cosine


def test_a_ratio_with_a_gradient_would_push_a_near_layer_away() -> None:
    c = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    torch.sum(c.sum() / c * (1 - c)).backward()
    # With S = 1.1 and R = sum (1 - c) / c = 4.111, the gradient at 0.9 is R - S / 0.81.
    assert c.grad[1].item() == pytest.approx(4.111 - 1.1 / 0.81, abs=1e-3)
    assert c.grad[1] > 0


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(InputError, match="layer_weights='cosine' is unknown; choose one of ratio, uniform"):
        layer_weights(torch.ones(2), "cosine")
    with pytest.raises(InputError, match="temperature=0 must be above 0"):
        layer_weights(torch.ones(2), "softmax", temperature=0)
