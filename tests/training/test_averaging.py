"""The average of weights is the recurrence, is saved with the model, and starts without its initial values' weight."""

import pytest
import torch
from torch import nn

from transmamba.errors import RecipeError
from transmamba.training import WeightAverage


def test_the_average_is_the_recurrence() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.5)
    exact = model[0].weight.detach().clone()
    for step in range(1, 12):
        with torch.no_grad():
            model[0].weight.normal_()
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))  # below 0.5 up to step 8
        exact = decay * exact + (1 - decay) * model[0].weight.detach()
    last = model[0].weight.detach().clone()
    average.copy_to(model)
    assert torch.allclose(model[0].weight, exact, atol=1e-6)
    assert not torch.allclose(model[0].weight, last)


def test_the_average_is_in_the_state_and_has_no_gradient() -> None:
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.9)
    average.update(model)
    assert not list(average.parameters())
    assert set(average.state_dict()) == {"steps", "weight", "bias"}
    other = WeightAverage(nn.Linear(3, 2), 0.9)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.get_buffer("weight"), average.get_buffer("weight"))
    assert int(other.steps) == 1


def test_what_is_added_to_the_model_later_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    average = WeightAverage(model, 0.9)
    model.add_module("extra", nn.Linear(2, 2))
    average.update(model)
    assert not [name for name in average.state_dict() if "extra" in name]


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_a_decay_is_a_share(decay: float) -> None:
    with pytest.raises(RecipeError, match=f"average_decay={decay} must be above 0 and below 1"):
        WeightAverage(nn.Linear(1, 1), decay)
