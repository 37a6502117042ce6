"""Training one model with the Trainer: what runs of every kind share once data, loss and arguments are known."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from transmamba.progress import without_progress_bars
from transmamba.recipes.training_run import TrainingRun
from transmamba.tasks import evaluate_language_model
from transmamba.training import TrainingHistory, TrainingProgress, TransMambaTrainer
from transmamba.training.progress import tensorboard_callbacks
from transmamba.training.trainer import EvaluateFunction, LossFunction, causal_lm_loss

__all__ = ["fit", "validate"]

Model = TypeVar("Model", bound=PreTrainedModel)


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
