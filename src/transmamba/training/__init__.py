"""Training: one Trainer for all losses, checkpoints that survive a crash, progress and history."""

from transmamba.training.averaging import KeepAverage, WeightAverage
from transmamba.training.checkpoints import last_complete_checkpoint
from transmamba.training.learning_rates import layer_rates
from transmamba.training.progress import EvaluationRow, TrainingHistory, TrainingProgress, TrainingRow
from transmamba.training.trainer import Batch, EvaluateFunction, LossFunction, TransMambaTrainer, causal_lm_loss
from transmamba.training.trans_points import MovingTransPoints

__all__ = [
    "Batch",
    "EvaluateFunction",
    "EvaluationRow",
    "KeepAverage",
    "LossFunction",
    "MovingTransPoints",
    "TrainingHistory",
    "TrainingProgress",
    "TrainingRow",
    "TransMambaTrainer",
    "WeightAverage",
    "causal_lm_loss",
    "last_complete_checkpoint",
    "layer_rates",
]
