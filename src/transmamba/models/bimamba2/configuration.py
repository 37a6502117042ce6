"""The configuration of a bidirectional Mamba-2 encoder: flat, in Hugging Face's names, checked when it is made."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from transmamba.errors import InputError
from transmamba.modules.bidirectional_mamba2 import DIRECTION_WEIGHTS


@strict
class BiMamba2Config(PreTrainedConfig):
    """Sizes and choices of a bidirectional Mamba-2 encoder. The defaults are those of MiniLM-L6 as a student.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, hidden_act, layer_norm_eps, type_vocab_size,
            initializer_range, pad_token_id: as in BERT.
        num_heads, head_dim: of the mixer; head_dim is the state size too, but for the mean term; None = hidden_size /
            num_heads.
        num_positions: learned position embeddings. Tokens beyond the last one take the last one's, so there is no
            longest text; 1 = the same vector for all tokens.
        direction_weights: "shared" = q, k, v and the convolution serve both directions; "separate" = each its own.
        conv_kernel: taps of the convolution on q, k and v, along each scan; 0 = none. conv_activation: SiLU behind it.
        mean_term: one more channel of state, which gives a token a weight whatever the query is; with it a head can
            average, as attention does.
        use_gate: SiLU(z) multiplies the sum of the directions. mixer_norm: an RMSNorm behind it, before o_proj.
        normalize: whether the sentence embedding has length 1.
        A_init_range, dt_min, dt_max: initial values of A and dt, as in Mamba-2.
    """

    model_type = "bimamba2"
    attribute_map: ClassVar[dict[str, str]] = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_heads"}

    vocab_size: int = 30522
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 6
    num_heads: int = 12
    head_dim: int | None = None
    num_positions: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    direction_weights: str = "shared"
    conv_kernel: int = 4
    conv_activation: bool = False
    mean_term: bool = True
    use_gate: bool = True
    mixer_norm: bool = False
    normalize: bool = True
    initializer_range: float = 0.02
    A_init_range: tuple | list = (1.0, 16.0)
    dt_min: float = 0.001
    dt_max: float = 0.1
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_heads", "num_positions"),
            "type_vocab_size",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.conv_kernel < 0:
            raise InputError(f"conv_kernel={self.conv_kernel} must be at least 0 (0 = none).")
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise InputError(
                    f"num_heads={self.num_heads} must divide hidden_size={self.hidden_size}; or give head_dim."
                )
            self.head_dim = self.hidden_size // self.num_heads
        if self.head_dim < 1:
            raise InputError(f"head_dim={self.head_dim} must be at least 1.")
        if self.direction_weights not in DIRECTION_WEIGHTS:
            raise InputError(
                f"direction_weights={self.direction_weights!r} is unknown; choose "
                f"{' or '.join(map(repr, DIRECTION_WEIGHTS))}."
            )
        if self.hidden_act not in ACT2FN:
            raise InputError(f"hidden_act={self.hidden_act!r} is unknown; choose {', '.join(sorted(ACT2FN))}.")
        low, high = self.A_init_range
        if not 0 < low <= high:
            raise InputError(f"A_init_range={[low, high]} must be 0 < low <= high; Mamba-2 uses [1, 16].")
        if not 0 < self.dt_min <= self.dt_max:
            raise InputError(
                f"dt_min={self.dt_min} and dt_max={self.dt_max} must be 0 < dt_min <= dt_max; Mamba-2 uses 0.001 and "
                "0.1."
            )
        self.A_init_range = list(self.A_init_range)
        super().__post_init__(**kwargs)
