"""A whole run that trains a language model: everything that decides what comes out of it."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import LlamaConfig, PreTrainedTokenizerFast

from transmamba.data import TextSource
from transmamba.errors import RecipeError
from transmamba.models import TransMambaConfig
from transmamba.recipes.sizes import count_parameters, match_parameters
from transmamba.recipes.training_run import TrainingRun, check_learning_rate
from transmamba.schedule import TransPointSchedule

__all__ = ["LanguageModelRun", "ModelSettings"]

ARCHITECTURES = ("transmamba", "llama")
OF_LLAMA = ("head_dim", "num_key_value_heads", "rope_theta", "tie_word_embeddings")  # that have a default here


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """The sizes and choices of TransMambaConfig that a recipe decides; the rest follows from the data and the run.

    architecture: "llama" trains transformers' own Llama, a Transformer for `transmamba convert` to start from; what a
        Llama does not have keeps its default then.
    match_shared_size: for the standard form. Change intermediate_size until the model has as many parameters as its
        shared form, so that baselines compare at one size.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    architecture: str = "transmamba"
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
        if self.architecture not in ARCHITECTURES:
            raise RecipeError(
                f"architecture={self.architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}."
            )
        if self.architecture == "llama":
            _check_llama(self)
        if self.match_shared_size and self.mixer_form != "standard":
            raise RecipeError(
                f'match_shared_size=True is for mixer_form="standard"; {self.mixer_form!r} has that size already. '
                "Set it to false."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModelRun(TrainingRun):
    """Everything that decides what a trained language model is, beside what TrainingRun says.

    schedule: a name, a written list such as "0,128,none", or a list. Layers that would switch at seq_len or later never
        run their SSM in training, so the model is made with None there.
    tokenizer: see `transmamba.data.load_tokenizer`; "train:N" learns from the training documents.
    max_steps, max_tokens, epochs: how long; exactly one of them.
    recompute_activations: less memory and slower steps, with the same weights to the last bit (TransMambaConfig).
    """

    model: ModelSettings
    text: TextSource
    schedule: str | tuple[int | None, ...] = "v9"
    tokenizer: str = "bytes"
    seq_len: int
    max_steps: int | None = None
    max_tokens: int | None = None
    epochs: float | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    recompute_activations: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", tuple(TransPointSchedule(self.schedule)))
        self.check_training()
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

    def model_config(self, tokenizer: PreTrainedTokenizerFast) -> TransMambaConfig | LlamaConfig:
        """The configuration of the model that this run trains."""
        settings = asdict(self.model)
        architecture, match_shared_size = settings.pop("architecture"), settings.pop("match_shared_size")
        settings |= {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": self.seq_len,
            "rope_parameters": {"rope_type": "default", "rope_theta": settings.pop("rope_theta")},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if architecture == "llama":
            return LlamaConfig(**{name: value for name, value in settings.items() if name not in _absent_in_llama()})
        settings["trans_points"] = self.trained_schedule.to_list()
        settings["recompute_activations"] = self.recompute_activations
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


def _absent_in_llama() -> dict[str, Any]:
    """The fields that mean nothing to a Llama, with their defaults."""
    sizes = ("architecture", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {entry.name: entry.default for entry in fields(ModelSettings) if entry.name not in (*sizes, *OF_LLAMA)}


def _check_llama(settings: ModelSettings) -> None:
    for name, default in _absent_in_llama().items():
        value = getattr(settings, name)
        if value != default:
            raise RecipeError(
                f'{name}={value!r} is nothing that architecture="llama" has; leave it out, or set the architecture to '
                '"transmamba".'
            )


def _check_run(run: LanguageModelRun) -> None:
    if run.seq_len < 2:
        raise RecipeError(f"seq_len={run.seq_len} must be at least 2: a token is predicted from one before it.")
    if run.recompute_activations and run.model.architecture == "llama":
        raise RecipeError('recompute_activations=True is nothing that architecture="llama" has; leave it out.')
    lengths = {name: getattr(run, name) for name in ("max_steps", "max_tokens", "epochs")}
    given = [f"{name}={value}" for name, value in lengths.items() if value is not None]
    if len(given) != 1:
        raise RecipeError(
            f"Give exactly one of max_steps, max_tokens and epochs; here {' and '.join(given) or 'none'} is given. "
            "Set the others to none."
        )
    for name in ("max_steps", "max_tokens"):
        value = getattr(run, name)
        if value is not None and value < 1:
            raise RecipeError(f"{name}={value} must be at least 1.")
    if run.epochs is not None and not run.epochs > 0:
        raise RecipeError(f"epochs={run.epochs} must be above 0.")
    check_learning_rate("learning_rate", run.learning_rate)
    if not 0 <= run.warmup_steps < math.inf:
        raise RecipeError(f"warmup_steps={run.warmup_steps} must be at least 0.")
    trained = run.trained_schedule  # raises ScheduleError unless it can be read and fits the layers
    if run.model.architecture == "llama" and set(trained) != {None}:
        raise RecipeError(
            f"schedule={run.schedule!r} switches layers within {run.seq_len} tokens, which a Llama cannot; set "
            'schedule="transformer", and convert the trained model to one that can.'
        )
