"""What models are for, and how well they do it: one file per task."""

from transmamba.tasks.agreement import (
    Agreement,
    Comparison,
    PositionAgreement,
    StudentScore,
    compare_language_models,
)
from transmamba.tasks.caption_retrieval import RetrievalScore, evaluate_caption_retrieval, read_captions
from transmamba.tasks.choices import ChoiceFile, ChoiceRow, read_choices
from transmamba.tasks.classification import ClassificationScore, ImageBatch, evaluate_classifier, linear_cka
from transmamba.tasks.harness import HarnessResult, TaskScore, evaluate_tasks, harness_model
from transmamba.tasks.language_modeling import Evaluation, PositionLoss, Windows, evaluate_language_model
from transmamba.tasks.recall import RecallOutcome, RecallScore, mean_recall, score_recall

__all__ = [
    "Agreement",
    "ChoiceFile",
    "ChoiceRow",
    "ClassificationScore",
    "Comparison",
    "Evaluation",
    "HarnessResult",
    "ImageBatch",
    "PositionAgreement",
    "PositionLoss",
    "RecallOutcome",
    "RecallScore",
    "RetrievalScore",
    "StudentScore",
    "TaskScore",
    "Windows",
    "compare_language_models",
    "evaluate_caption_retrieval",
    "evaluate_classifier",
    "evaluate_language_model",
    "evaluate_tasks",
    "harness_model",
    "linear_cka",
    "mean_recall",
    "read_captions",
    "read_choices",
    "score_recall",
]
