"""What models are for, and how well they do it: one file per task."""

from transmamba.tasks.agreement import (
    Agreement,
    Comparison,
    PositionAgreement,
    StudentScore,
    compare_language_models,
)
from transmamba.tasks.language_modeling import Evaluation, PositionLoss, Windows, evaluate_language_model
from transmamba.tasks.recall import RecallOutcome, RecallScore, mean_recall, score_recall

__all__ = [
    "Agreement",
    "Comparison",
    "Evaluation",
    "PositionAgreement",
    "PositionLoss",
    "RecallOutcome",
    "RecallScore",
    "StudentScore",
    "Windows",
    "compare_language_models",
    "evaluate_language_model",
    "mean_recall",
    "score_recall",
]
