"""What models are for, and how well they do it: one file per task."""

from transmamba.tasks.choices import ChoiceFile, ChoiceRow, read_choices
from transmamba.tasks.harness import HarnessResult, TaskScore, evaluate_tasks, harness_model
from transmamba.tasks.language_modeling import Evaluation, PositionLoss, Windows, evaluate_language_model

__all__ = [
    "ChoiceFile",
    "ChoiceRow",
    "Evaluation",
    "HarnessResult",
    "PositionLoss",
    "TaskScore",
    "Windows",
    "evaluate_language_model",
    "evaluate_tasks",
    "harness_model",
    "read_choices",
]
