"""The Trainer: transformers' own, with the loss and the evaluation handed in, and checkpoints that survive a crash.

Pretraining, fine-tuning and distillation are this Trainer with three loss functions; a distillation loss closes over
its teacher. What differs from transformers.Trainer:
    a step whose loss is not finite ends the run and is named; weights that are not finite are never saved;
    a checkpoint counts once it is complete (see `checkpoints`), and only then do older ones go;
    weight decay acts on matrices: projections, embeddings and convolutions. Norms, biases, A_log, dt_bias and D are
    left alone, as in Mamba: decay would pull A to -1, dt to softplus(0) and norms to 0. So are the positions and
    class tokens of images, as in DeiT.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from transmamba.errors import CheckpointError, InputError, RecipeError
from transmamba.training.checkpoints import last_complete_checkpoint, mark_complete, remove_older_checkpoints

__all__ = [
    "Batch",
    "EvaluateFunction",
    "LossFunction",
    "TransMambaTrainer",
    "causal_lm_loss",
    "decayed_parameter_names",
]

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, Mapping[str, Tensor | float]]]
EvaluateFunction = Callable[[PreTrainedModel, Any], Mapping[str, float]]

# Of two dimensions or more in Mamba-1 and in models of images, and no matrices all the same.
UNDECAYED = (
    *("A_log", "A_b_log", "A_logs", "dt_projs_bias"),
    *("pos_embed", "temporal_pos_embedding", "position_embeddings", "cls_token", "distillation_token"),
)
TRAINING_ARGUMENTS = "training_args.bin"  # a pickle that transformers adds and nobody reads


def causal_lm_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
    """The model's own next-token loss: the sum over the batch divided by `num_items_in_batch`, in nats."""
    return model(**batch, use_cache=False).loss, {}


class TransMambaTrainer(Trainer):
    """Train with `loss_fn(model, batch) -> (loss, metrics)`.

    loss_fn: the batch holds the tensors of the data set and `num_items_in_batch`, the number of predicted tokens in all
        micro-batches of the step, on all devices. The loss is the sum over the micro-batch divided by that number, so
        that accumulating over micro-batches gives the gradient of the whole. metrics are logged beside the loss, as
        means over micro-batches.
    evaluate_fn: (model, eval_dataset) -> numbers, logged with "eval_" in front.
    keep_checkpoints: how many complete checkpoints stay.
    rates: of parameters by name, the share of the learning rate that each gets; 1 where there is none.
    """

    control: TrainerControl

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        train_dataset: Dataset[dict[str, Tensor]],
        eval_dataset: Dataset[dict[str, Tensor]] | None = None,
        loss_fn: LossFunction = causal_lm_loss,
        evaluate_fn: EvaluateFunction | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        keep_checkpoints: int = 2,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        if keep_checkpoints < 1:
            raise RecipeError(f"keep_checkpoints={keep_checkpoints} must be at least 1.")
        # Several GPUs in sight of one process would make a DataParallel, which cannot cut packed windows; torchrun can.
        args._n_gpu = min(1, args.n_gpu)
        args.logging_nan_inf_filter = False  # it would replace a loss that is not finite by an average
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=data_collator or stack,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # count num_items_in_batch, and do not divide the loss again
        self.loss_fn = loss_fn
        self.evaluate_fn = evaluate_fn
        self.keep_checkpoints = keep_checkpoints
        self.rates = dict(rates or {})
        self._first_bad_step = torch.tensor(-1, device=args.device)
        self._metric_sums: dict[tuple[str, ...], Tensor] = {}  # by the names of what is in them
        self._metric_count = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        assert not return_outputs, "evaluate_fn evaluates"
        step = self.state.global_step + 1
        try:
            # The model computes in bf16 by itself; what a loss computes beside it (a head, a teacher) needs this.
            with self.accelerator.autocast():
                loss, metrics = self.loss_fn(model, {**inputs, "num_items_in_batch": num_items_in_batch})
        except InputError as error:
            raise RecipeError(
                f"Step {step}: {error} If the values grew from step to step: {self._way_out()}"
            ) from error
        bad = (self._first_bad_step < 0) & ~torch.isfinite(loss.detach())
        self._first_bad_step = torch.where(bad, step, self._first_bad_step)
        if (
            loss.device.type == "cpu"
        ):  # elsewhere reading it would stall the queue; there it is read when logging or saving
            self._check_finite()
        self._add_metrics(metrics, loss.device)
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the loss function's metrics since the last time."""
        self._check_finite()
        if "loss" in logs and self._metric_count:
            totals: Counter[str] = Counter()
            for names, sums in self._metric_sums.items():
                totals.update(dict(zip(names, sums.tolist(), strict=True)))
            logs |= {name: total / self._metric_count for name, total in totals.items()}
            self._metric_sums, self._metric_count = {}, 0
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Call evaluate_fn on the evaluation data and log what it returns."""
        self._check_finite()
        if self.evaluate_fn is None:
            raise RecipeError("This Trainer has no evaluate_fn; pass one, or do not ask for evaluation.")
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        measured = self.evaluate_fn(self.accelerator.unwrap_model(self.model), dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's own, or with a group of parameters for each rate and each weight decay."""
        if not self.rates:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((self.rates.get(name, 1.0), name in decayed), []).append(parameter)
        optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
        # The first group's rate is the one that is logged.
        in_order = sorted(groups.items(), key=lambda item: (item[0][0] != 1, -item[0][0]))
        self.optimizer: torch.optim.Optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.args.learning_rate * rate,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (rate, decays), parameters in in_order
            ],
            **arguments,
        )
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that weight decay acts on."""
        return decayed_parameter_names(model)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None are counted: transformers would walk through every module at every step for a number nobody reads."""
        return 0

    def _add_metrics(self, metrics: Mapping[str, Tensor | float], device: torch.device) -> None:
        """Add to the sums, all at once: a kernel for each would take longer than small models do."""
        self._metric_count += 1
        if not metrics:
            return
        names = tuple(metrics)
        values = torch.stack([torch.as_tensor(value, device=device).detach().float() for value in metrics.values()])
        self._metric_sums[names] = self._metric_sums[names] + values if names in self._metric_sums else values

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._check_weights(folder)
        if self.args.should_save and folder.exists():  # left by a process that was killed while it wrote
            shutil.rmtree(folder)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (folder / TRAINING_ARGUMENTS).unlink(missing_ok=True)
                mark_complete(folder)
        except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:  # torch and safetensors wrap OSError
            raise self._not_saved(folder, error) from error
        if self.args.should_save:
            remove_older_checkpoints(folder.parent, keep=self.keep_checkpoints)

    def _not_saved(self, folder: Path, error: Exception) -> CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)
        last = last_complete_checkpoint(folder.parent)
        kept = f"{last} is whole; resume from it" if last else "there is no earlier one"
        reason = " ".join(str(error).split())
        return CheckpointError(
            f"{folder} could not be written ({reason}) and has been removed; {kept} once there is room on the disk."
        )

    def _check_finite(self) -> None:
        step = int(self._first_bad_step)
        if step >= 0:
            raise RecipeError(f"The loss is not finite at step {step}. {self._way_out()}")

    def _check_weights(self, folder: Path) -> None:
        bad = [name for name, parameter in self.model.named_parameters() if not bool(torch.isfinite(parameter).all())]
        if bad:
            raise RecipeError(
                f"After step {self.state.global_step}, {len(bad)} parameters are not finite, {bad[0]} among them, so "
                f"{folder} is not written. {self._way_out()}"
            )

    def _way_out(self) -> str:
        last = last_complete_checkpoint(self.args.output_dir)
        rest = f" The last complete checkpoint is {last}." if last else ""
        return f"Try a learning_rate below {self.args.learning_rate:g}, or more warmup_steps.{rest}"


def decayed_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters with two dimensions or more, but for those of UNDECAYED."""
    return [
        name for name, parameter in model.named_parameters() if parameter.dim() >= 2 and not name.endswith(UNDECAYED)
    ]


def stack(items: list[dict[str, Tensor]] | dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack items of equal shapes; a data set that gives whole batches has done so."""
    if isinstance(items, dict):
        return items
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
