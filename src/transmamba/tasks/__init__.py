"""What models are for, and how well they do it: one file per task."""

from transmamba.tasks.language_modeling import Evaluation, PositionLoss, Windows, evaluate_language_model

__all__ = ["Evaluation", "PositionLoss", "Windows", "evaluate_language_model"]
