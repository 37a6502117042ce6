"""What every run that trains has: batches, the optimizer, how often to look, where to write."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import TrainingArguments

from transmamba.errors import RecipeError
from transmamba.recipes.fields import from_json

__all__ = ["TrainingRun", "check_learning_rate", "is_main_process", "world_size"]

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """The part of a run that says how it is trained. Lengths are in tokens, steps are optimizer steps.

    batch_size: windows per step, over all devices; gradient_accumulation cuts it into so many parts.
    min_learning_rate_ratio: where the cosine ends, as a share of the learning rate.
    eval_every, save_every: in steps; None = at the end only. eval_tokens: of the validation documents, so many during
        training; the final score is over all of them.
    dtype: "bfloat16" computes products in bf16, with fp32 weights; "auto" does so on GPUs that can.
    output: the run's folder.
    """

    name: str
    batch_size: int
    gradient_accumulation: int = 1
    min_learning_rate_ratio: float = 0.1
    weight_decay: float = 0.1
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 1.0
    seed: int = 0
    log_every: int = 1
    eval_every: int | None = None
    eval_tokens: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    dtype: str = "auto"
    output: str = ""

    def check_training(self) -> None:
        """Fill in the output folder and check this part of the run; a run calls it when it is made."""
        if not self.output:
            object.__setattr__(self, "output", f"runs/{self.name}")
        _check(self)

    @property
    def micro_batch(self) -> int:
        """Windows that one device reads at a time."""
        return self.batch_size // self.gradient_accumulation // world_size()

    def check_batches(self, seq_len: int, num_windows: int, source: str) -> None:
        """Raise RecipeError unless a step can be cut into its parts and the windows fill one."""
        parts = self.gradient_accumulation * world_size()
        if self.batch_size % parts:
            raise RecipeError(
                f"batch_size={self.batch_size} cannot be cut into {parts} equal parts, gradient_accumulation="
                f"{self.gradient_accumulation} on each of {world_size()} processes; change one of them."
            )
        if num_windows < self.batch_size:
            raise RecipeError(
                f"batch_size={self.batch_size} windows of {seq_len} tokens are more than the {num_windows} that "
                f"{source} gives for training; use a smaller batch_size or seq_len, or more text."
            )

    def uses_bf16(self, device: str) -> bool:
        """Whether products are computed in bf16 on devices of this type."""
        wanted = self.dtype == "auto" and device == "cuda" and torch.cuda.is_bf16_supported()
        return self.dtype == "bfloat16" or wanted

    def training_arguments(
        self,
        folder: Path,
        device: str,
        *,
        num_steps: int,
        learning_rate: float,
        warmup_steps: int,
        seed: int,
        evaluates: bool,
        has_unused_parameters: bool,
    ) -> TrainingArguments:
        """What transformers' Trainer is told. has_unused_parameters: some get no gradient in some step."""
        return TrainingArguments(
            output_dir=str(folder),
            max_steps=num_steps,
            per_device_train_batch_size=self.micro_batch,
            gradient_accumulation_steps=self.gradient_accumulation,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": self.min_learning_rate_ratio},
            warmup_steps=warmup_steps,
            weight_decay=self.weight_decay,
            adam_beta1=self.adam_betas[0],
            adam_beta2=self.adam_betas[1],
            max_grad_norm=self.max_gradient_norm,
            seed=seed,
            bf16=self.uses_bf16(device),
            use_cpu=device == "cpu",
            logging_steps=self.log_every,
            logging_first_step=True,
            include_num_input_tokens_seen="all",
            eval_strategy="steps" if evaluates and self.eval_every is not None else "no",
            eval_steps=self.eval_every,
            save_strategy="steps",
            save_steps=self.save_every or num_steps,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_drop_last=True,
            dataloader_pin_memory=device == "cuda",
            ddp_find_unused_parameters=has_unused_parameters,
            use_cache=True,  # otherwise the Trainer writes use_cache=False into the model's config
        )

    def to_json(self) -> dict[str, Any]:
        """The run in JSON's types; `from_json` reads it back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The run that `to_json` wrote."""
        return from_json(cls, content)


def world_size() -> int:
    """How many processes train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes."""
    return os.environ.get("RANK", "0") == "0"


def check_learning_rate(name: str, value: float) -> None:
    """Raise RecipeError unless the value can be a learning rate."""
    if not 0 < value < math.inf:
        raise RecipeError(f"{name}={value} must be above 0; 1e-3 suits small models.")


def _check(run: TrainingRun) -> None:
    at_least_one = ("batch_size", "gradient_accumulation", "log_every", "keep_checkpoints")
    optional = ("eval_every", "eval_tokens", "save_every")
    for name in (*at_least_one, *optional):
        value = getattr(run, name)
        if (name in at_least_one or value is not None) and value < 1:
            raise RecipeError(f"{name}={value} must be at least 1.")
    if run.batch_size % run.gradient_accumulation:
        raise RecipeError(
            f"gradient_accumulation={run.gradient_accumulation} must divide batch_size={run.batch_size}, which it cuts "
            "into parts."
        )
    if not 0 <= run.min_learning_rate_ratio <= 1:
        raise RecipeError(f"min_learning_rate_ratio={run.min_learning_rate_ratio} must be between 0 and 1.")
    for name in ("weight_decay", "seed"):
        if not 0 <= getattr(run, name) < math.inf:
            raise RecipeError(f"{name}={getattr(run, name)} must be at least 0.")
    if len(run.adam_betas) != 2 or not all(0 <= beta < 1 for beta in run.adam_betas):
        raise RecipeError(f"adam_betas={run.adam_betas} must be two numbers, each at least 0 and below 1.")
    if not 0 < run.max_gradient_norm < math.inf:
        raise RecipeError(f"max_gradient_norm={run.max_gradient_norm} must be above 0; a large number never clips.")
    if run.dtype not in DTYPES:
        raise RecipeError(f"dtype={run.dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
