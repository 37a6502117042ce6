"""Training one model with the Trainer: what runs of every kind share once data, loss and arguments are known."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from transmamba.progress import without_progress_bars
from transmamba.recipes.training_run import TrainingRun, is_main_process
from transmamba.tasks import evaluate_language_model
from transmamba.training import TrainingHistory, TrainingProgress, TransMambaTrainer, last_complete_checkpoint
from transmamba.training.progress import tensorboard_callbacks
from transmamba.training.trainer import EvaluateFunction, LossFunction, causal_lm_loss

__all__ = ["StageFolder", "fit", "validate"]

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFolder:
    """Where one of the trainings of a run keeps its history and checkpoints. step: the last checkpoint's, 0 without."""

    folder: Path
    history: TrainingHistory
    checkpoint: Path | None
    step: int

    @staticmethod
    def begin(folder: Path, *, resume: bool) -> "StageFolder":
        """A new one, or with `resume` the one whose last complete checkpoint lies in the folder."""
        checkpoint = last_complete_checkpoint(folder) if resume else None
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if is_main_process():
            folder.mkdir(exist_ok=True)
            if checkpoint:
                logger.info("resuming %s from %s", folder.name, checkpoint)
        history = TrainingHistory(folder if is_main_process() else None, resume_step=step)
        return StageFolder(folder=folder, history=history, checkpoint=checkpoint, step=step)

    def result_of(self, steps: int) -> Path | None:
        """The checkpoint that is the result, where no step is left to take."""
        return self.checkpoint if self.step >= steps else None


def fit(
    model: Model,
    arguments: TrainingArguments,
    *,
    train: Any,
    validation: Any,
    evaluate_fn: EvaluateFunction,
    tokenizer: PreTrainedTokenizerFast | None,
    history: TrainingHistory,
    checkpoint: Path | None,
    description: str,
    keep_checkpoints: int,
    loss_fn: LossFunction = causal_lm_loss,
    callbacks: Sequence[TrainerCallback] = (),
    data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
    rates: Mapping[str, float] | None = None,
) -> Model:
    """Train to the end, from a checkpoint if there is one, and return the model, on its device.

    data_collator: None = items have equal shapes and are stacked. rates: as TransMambaTrainer takes them.
    """
    progress = TrainingProgress(history, description)
    logs = Path(arguments.output_dir) / "tensorboard"
    trainer = TransMambaTrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=validation,
        loss_fn=loss_fn,
        evaluate_fn=evaluate_fn,
        tokenizer=tokenizer,
        callbacks=[progress, *callbacks, *tensorboard_callbacks(logs)],
        keep_checkpoints=keep_checkpoints,
        data_collator=data_collator,
        rates=rates,
    )
    try:
        with without_progress_bars():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    # Unwrapping leaves this mark, at which the next training of the same model would go on without bf16.
    vars(trained).pop("_is_accelerate_prepared", None)
    return trained


def validate(model: Any, dataset: Any, run: TrainingRun) -> dict[str, float]:
    """The numbers that are logged as validation while a run trains."""
    score = evaluate_language_model(model, dataset, batch_size=run.micro_batch, max_tokens=run.eval_tokens)
    return {"loss": score.loss, "bits_per_byte": score.bits_per_byte}
