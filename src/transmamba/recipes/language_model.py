"""A whole run that trains a language model: everything that decides what comes out of it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from transformers import PreTrainedTokenizerFast

from transmamba.data import TextSource
from transmamba.errors import RecipeError
from transmamba.models import TransMambaConfig
from transmamba.recipes.fields import from_json
from transmamba.recipes.sizes import count_parameters, match_parameters
from transmamba.schedule import TransPointSchedule

__all__ = ["LanguageModelRun", "ModelSettings"]

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """The sizes and choices of TransMambaConfig that a recipe decides; the rest follows from the data and the run.

    match_shared_size: for the standard form. Change intermediate_size until the model has as many parameters as its
        shared form, so that baselines compare at one size.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    num_state_heads: int | None = None
    head_dim: int | None = None
    mixer_form: str = "shared"
    match_shared_size: bool = False
    conv_kernel: int = 4
    mode_norm: bool = False
    ssm_rope: bool = False
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.match_shared_size and self.mixer_form != "standard":
            raise RecipeError(
                f'match_shared_size=True is for mixer_form="standard"; {self.mixer_form!r} has that size already. '
                "Set it to false."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelRun:
    """Everything that decides what a trained language model is. Lengths are in tokens, steps are optimizer steps.

    schedule: a name, a written list such as "0,128,none", or a list. Layers that would switch at seq_len or later never
        run their SSM in training, so the model is made with None there.
    tokenizer: see `transmamba.data.load_tokenizer`; "train:N" learns from the training documents.
    batch_size: windows of seq_len per step, over all devices; gradient_accumulation cuts it into so many parts.
    max_steps, max_tokens, epochs: how long; exactly one of them.
    min_learning_rate_ratio: where the cosine ends, as a share of learning_rate.
    eval_every, save_every: in steps; None = at the end only. eval_tokens: of the validation documents, so many during
        training; the final score is over all of them.
    dtype: "bfloat16" computes products in bf16, with fp32 weights; "auto" does so on GPUs that can.
    output: the run's folder.
    """

    name: str
    model: ModelSettings
    text: TextSource
    schedule: str | tuple[int | None, ...] = "v9"
    tokenizer: str = "bytes"
    seq_len: int
    batch_size: int
    gradient_accumulation: int = 1
    max_steps: int | None = None
    max_tokens: int | None = None
    epochs: float | None = None
    learning_rate: float = 1e-3
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 0
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

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", tuple(TransPointSchedule(self.schedule)))
        if not self.output:
            object.__setattr__(self, "output", f"runs/{self.name}")
        _check_run(self)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def trained_schedule(self) -> TransPointSchedule:
        """The schedule that training runs: None for the layers that would switch at seq_len or beyond."""
        return self.asked_schedule.stays_attention_from(self.seq_len)

    @property
    def asked_schedule(self) -> TransPointSchedule:
        layers = self.model.num_hidden_layers
        if isinstance(self.schedule, str):
            return TransPointSchedule.parse(self.schedule, layers, self.seq_len)
        schedule = TransPointSchedule(self.schedule)
        schedule.check_num_layers(layers)
        return schedule

    def model_config(self, tokenizer: PreTrainedTokenizerFast) -> TransMambaConfig:
        """The configuration of the model that this run trains."""
        settings = asdict(self.model)
        match_shared_size, rope_theta = settings.pop("match_shared_size"), settings.pop("rope_theta")
        settings |= {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": self.seq_len,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
            "trans_points": self.trained_schedule.to_list(),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config = TransMambaConfig(**settings)
        if match_shared_size:
            return match_parameters(config, count_parameters(TransMambaConfig(**settings | {"mixer_form": "shared"})))
        return config

    def num_steps(self, num_windows: int) -> int:
        """Optimizer steps, for a training set of so many windows."""
        if self.max_steps is not None:
            return self.max_steps
        if self.max_tokens is not None:
            return math.ceil(self.max_tokens / self.tokens_per_step)
        assert self.epochs is not None
        return max(1, round(self.epochs * num_windows / self.batch_size))

    def to_json(self) -> dict[str, Any]:
        """The run in JSON's types; `from_json` reads it back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The run that `to_json` wrote."""
        return from_json(cls, content)


def _check_run(run: LanguageModelRun) -> None:
    at_least_one = ("batch_size", "gradient_accumulation", "log_every", "keep_checkpoints")
    optional = ("max_steps", "max_tokens", "eval_every", "eval_tokens", "save_every")
    for name in (*at_least_one, *optional):
        value = getattr(run, name)
        if (name in at_least_one or value is not None) and value < 1:
            raise RecipeError(f"{name}={value} must be at least 1.")
    if run.seq_len < 2:
        raise RecipeError(f"seq_len={run.seq_len} must be at least 2: a token is predicted from one before it.")
    if run.batch_size % run.gradient_accumulation:
        raise RecipeError(
            f"gradient_accumulation={run.gradient_accumulation} must divide batch_size={run.batch_size}, which it cuts "
            "into parts."
        )
    lengths = {name: getattr(run, name) for name in ("max_steps", "max_tokens", "epochs")}
    given = [f"{name}={value}" for name, value in lengths.items() if value is not None]
    if len(given) != 1:
        raise RecipeError(
            f"Give exactly one of max_steps, max_tokens and epochs; here {' and '.join(given) or 'none'} is given. "
            "Set the others to none."
        )
    if run.epochs is not None and not run.epochs > 0:
        raise RecipeError(f"epochs={run.epochs} must be above 0.")
    if not 0 < run.learning_rate < math.inf:
        raise RecipeError(f"learning_rate={run.learning_rate} must be above 0; 1e-3 suits small models.")
    if not 0 <= run.min_learning_rate_ratio <= 1:
        raise RecipeError(f"min_learning_rate_ratio={run.min_learning_rate_ratio} must be between 0 and 1.")
    for name in ("warmup_steps", "weight_decay", "seed"):
        if not 0 <= getattr(run, name) < math.inf:
            raise RecipeError(f"{name}={getattr(run, name)} must be at least 0.")
    if len(run.adam_betas) != 2 or not all(0 <= beta < 1 for beta in run.adam_betas):
        raise RecipeError(f"adam_betas={run.adam_betas} must be two numbers, each at least 0 and below 1.")
    if not 0 < run.max_gradient_norm < math.inf:
        raise RecipeError(f"max_gradient_norm={run.max_gradient_norm} must be above 0; a large number never clips.")
    if run.dtype not in DTYPES:
        raise RecipeError(f"dtype={run.dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    assert run.trained_schedule  # raises ScheduleError unless it can be read and fits the layers
