"""TransPoints that move while a model trains."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from transmamba.models import TransMambaForCausalLM
from transmamba.schedule import TransPointSchedule

__all__ = ["MovingTransPoints"]


class MovingTransPoints(TrainerCallback):
    """Before each step, run the model with the schedule that `schedule_at(step)` says; the first step is 0."""

    def __init__(self, model: TransMambaForCausalLM, schedule_at: Callable[[int], TransPointSchedule]) -> None:
        self.model = model
        self.schedule_at = schedule_at

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.model.set_trans_points(self.schedule_at(state.global_step))
