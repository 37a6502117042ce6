"""An exponential moving average of a model's weights, which is often a better model than the last step's.

The average is a module, so that where it is a part of the model that trains, checkpoints hold it and resuming is exact.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from transmamba.errors import RecipeError

__all__ = ["KeepAverage", "WeightAverage"]


class WeightAverage(nn.Module):
    """The average of a model's parameters over steps; made before anything else is added to the model.

    decay: the weight of the past at every step. At first it is less, (1 + n) / (10 + n) at step n, so that the initial
    values are soon forgotten.
    """

    steps: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise RecipeError(f"average_decay={decay} must be above 0 and below 1; 0.999 is usual.")
        self.decay = decay
        self.names = {name: name.replace(".", "__") for name, _ in model.named_parameters()}
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for name, parameter in model.named_parameters():
            self.register_buffer(self.names[name], parameter.detach().clone())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's weights in."""
        self.steps += 1
        count = int(self.steps)
        decay = min(self.decay, (1 + count) / (10 + count))
        parameters = dict(model.named_parameters())
        for name, own in self.names.items():
            self.get_buffer(own).lerp_(parameters[name].to(self.get_buffer(own).dtype), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the average in the place of its weights."""
        parameters = dict(model.named_parameters())
        for name, own in self.names.items():
            parameters[name].copy_(self.get_buffer(own))


class KeepAverage(TrainerCallback):
    """After each step, the average takes the model's weights in."""

    def __init__(self, model: nn.Module, average: WeightAverage) -> None:
        self.model = model
        self.average = average

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.average.update(self.model)
