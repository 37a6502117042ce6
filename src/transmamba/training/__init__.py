"""Training: one Trainer for all losses, checkpoints that survive a crash, progress and history."""

from transmamba.training.checkpoints import last_complete_checkpoint
from transmamba.training.progress import EvaluationRow, TrainingHistory, TrainingProgress, TrainingRow
from transmamba.training.trainer import Batch, EvaluateFunction, LossFunction, TransMambaTrainer, causal_lm_loss

__all__ = [
    "Batch",
    "EvaluateFunction",
    "EvaluationRow",
    "LossFunction",
    "TrainingHistory",
    "TrainingProgress",
    "TrainingRow",
    "TransMambaTrainer",
    "causal_lm_loss",
    "last_complete_checkpoint",
]
