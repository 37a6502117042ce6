"""The configuration of a TransMamba language model: flat, in Hugging Face's names, checked when it is made."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from transmamba.errors import InputError
from transmamba.schedule import TransPointSchedule

MIXER_FORMS = ("shared", "standard")
NORM_TYPES = ("rms", "layer")
POSITION_EMBEDDINGS = ("rotary", "learned")


@strict
class TransMambaConfig(PreTrainedConfig):
    """Sizes and choices of a TransMamba language model.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
        rms_norm_eps, hidden_act,
            attention_bias, mlp_bias, rope_parameters, tie_word_embeddings, initializer_range: as in Llama.
                intermediate_size = 0: no MLP.
        trans_points: a TransPointSchedule, a list with an int or None per layer, or a schedule's name. Default: V9 for
            max_position_embeddings, with None where it would switch at or beyond that length.
        max_position_embeddings: the length the model is trained at. Layers that never switched within it have an
            untrained SSM.
        num_state_heads: heads of dt, A and the state; a multiple of num_key_value_heads that divides
            num_attention_heads.
        conv_kernel: taps of the causal convolution on q, k and v in both modes; 0 = none.
        use_gate: gate the SSM's output with SiLU(z). gate_bias: z has a bias, so that the gate can begin constant.
        mode_norm: an RMSNorm of each mode's output before o_proj (the SSM's is Mamba-2's gated norm).
        ssm_rope: rotary embedding in both modes; otherwise inside softmax only.
        mixer_form: "shared" = every layer can run both modes. "standard" = each layer is a plain Transformer layer
            (trans_point None: no convolution, gate or SSM parameters) or a Mamba-2 layer with gated norm (trans_point
            0); the schedule is then fixed.
        A_init_range, dt_min, dt_max, dt_init_floor: initial values of A and dt, as in Mamba-2.
        norm_type: "rms", or "layer" = with mean and bias; rms_norm_eps is the epsilon of either.
        qk_norm: an RMSNorm of every head's q and k before the rotary embedding, in both modes (Qwen3).
        attention_output_bias: of o_proj; None = attention_bias (Qwen2 has biases on q, k and v alone).
        mlp_gated: SwiGLU; otherwise down(act(up(x))) (GPT-2).
        position_embedding: "rotary", or "learned" = a table of max_position_embeddings added to the token embeddings,
            and no rotary embedding.
        rope_layers: whether each layer has rotary embedding, a bool per layer; None = all (SmolLM3 leaves out every
            fourth).
        recompute_activations: in training, compute again in backward what is cheap to compute and large to keep; the
            same gradients, less memory, a slower step. docs/training_memory.md says how much.
    """

    model_type = "transmamba"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 -- transformers' own class attribute

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    num_state_heads: int | None = None
    head_dim: int | None = None
    trans_points: Any = None
    mixer_form: str = "shared"
    conv_kernel: int = 4
    conv_bias: bool = True
    use_gate: bool = True
    mode_norm: bool = False
    ssm_rope: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    A_init_range: tuple | list = (1.0, 16.0)
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    norm_type: str = "rms"
    qk_norm: bool = False
    attention_output_bias: bool | None = None
    gate_bias: bool = False
    mlp_gated: bool = True
    position_embedding: str = "rotary"
    rope_layers: list | tuple | None = None
    recompute_activations: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_state_heads is None:
            self.num_state_heads = self.num_attention_heads
        _check_sizes(self)
        if self.head_dim is None:
            _check_divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
            self.head_dim = self.hidden_size // self.num_attention_heads
        _check_divides("num_key_value_heads", self.num_key_value_heads, "num_state_heads", self.num_state_heads)
        _check_divides("num_state_heads", self.num_state_heads, "num_attention_heads", self.num_attention_heads)
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        _check_positions(self)
        if self.head_dim % 2:
            raise InputError(f"head_dim={self.head_dim} must be even for rotary embedding; try {self.head_dim + 1}.")
        self.A_init_range = list(self.A_init_range)
        self.rope_layers = None if self.rope_layers is None else list(self.rope_layers)
        self.trans_points = _schedule(self.trans_points, self).to_list()
        super().__post_init__(**kwargs)

    @property
    def schedule(self) -> TransPointSchedule:
        """trans_points as a schedule."""
        return TransPointSchedule(self.trans_points)

    def check_schedule(self, schedule: Sequence[int | None] | str) -> TransPointSchedule:
        """Return the schedule, checked against this model's layers and form."""
        return _schedule(schedule, self)


def _schedule(given: Any, config: TransMambaConfig) -> TransPointSchedule:
    length = config.max_position_embeddings
    if given is None:
        schedule = (
            TransPointSchedule.named("v9", config.num_hidden_layers, length)
            if config.mixer_form == "shared"
            else (TransPointSchedule.named("transformer", config.num_hidden_layers, length))
        )
        schedule = schedule.stays_attention_from(length)
    elif isinstance(given, str):
        schedule = TransPointSchedule.parse(given, config.num_hidden_layers, length)
    else:
        schedule = TransPointSchedule(given)
    schedule.check_num_layers(config.num_hidden_layers)
    if config.mixer_form == "standard":
        for layer, point in enumerate(schedule):
            if point not in (None, 0):
                raise InputError(
                    f"layer {layer} has TransPoint {point}, but mixer_form='standard' has layers of one mode only: "
                    "use 0 or None, or mixer_form='shared'."
                )
    return schedule


def _check_sizes(config: TransMambaConfig) -> None:
    positive = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_state_heads",
    )
    for name in (*positive, "max_position_embeddings"):
        value = getattr(config, name)
        if value < 1:
            raise InputError(f"{name}={value} must be at least 1.")
    for name in ("intermediate_size", "conv_kernel"):
        if getattr(config, name) < 0:
            raise InputError(f"{name}={getattr(config, name)} must be at least 0 (0 = none).")
    choices = {"mixer_form": MIXER_FORMS, "norm_type": NORM_TYPES, "position_embedding": POSITION_EMBEDDINGS}
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            raise InputError(f"{name}={value!r} is unknown; choose {' or '.join(map(repr, known))}.")
    if config.hidden_act not in ACT2FN:
        raise InputError(f"hidden_act={config.hidden_act!r} is unknown; choose {', '.join(sorted(ACT2FN))}.")
    low, high = config.A_init_range
    if not 0 < low <= high:
        raise InputError(f"A_init_range={[low, high]} must be 0 < low <= high; Mamba-2 uses [1, 16].")
    if not 0 < config.dt_min <= config.dt_max:
        raise InputError(
            f"dt_min={config.dt_min} and dt_max={config.dt_max} must be 0 < dt_min <= dt_max; "
            "Mamba-2 uses 0.001 and 0.1."
        )


def _check_positions(config: TransMambaConfig) -> None:
    if config.position_embedding == "learned" and (config.ssm_rope or config.rope_layers is not None):
        raise InputError("position_embedding='learned' leaves no rotary embedding; drop ssm_rope and rope_layers.")
    given = config.rope_layers
    if given is not None and len(given) != config.num_hidden_layers:
        raise InputError(
            f"rope_layers has {len(given)} entries and the model {config.num_hidden_layers} layers; "
            "give a bool per layer."
        )
    for layer, entry in enumerate(given or ()):
        if not isinstance(entry, bool):
            raise InputError(f"rope_layers: layer {layer} has {entry!r}; give true or false.")


def _check_divides(small: str, small_value: int, large: str, large_value: int) -> None:
    if large_value % small_value:
        raise InputError(f"{small}={small_value} must divide {large}={large_value}.")
