"""The bidirectional Mamba-2 encoder: BERT's embeddings and post-norm blocks around a mixer of two scans.

Notable: any length, at linear cost; padding may stand anywhere in a row, and no other token reads it; a row's result is
that of the row alone. The sentence embedding is the mean over the row's tokens, as in sentence-transformers.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from transmamba.errors import InputError
from transmamba.models.initial_values import InitialValue, apply_initial_value, find_initial_value
from transmamba.modules import BidirectionalMamba2Mixer, DirectionOutput
from transmamba.modules.plain import norm_of_sum
from transmamba.modules.scan_orders import TOKEN_WITHOUT_PATCH
from transmamba.ops.checks import check_finite, values_are_checked
from transmamba.ops.turning import turned_rows

from .configuration import BiMamba2Config

DT_INIT_FLOOR = 1e-4  # of Mamba-2
FORWARD, BACKWARD = "forward", "backward"


@dataclass
class BiMamba2Output(ModelOutput):
    """What the encoder returns.

    last_hidden_state (batch, seq_len, hidden_size): zero in padding. pooler_output (batch, hidden_size): the sentence
    embedding. hidden_states: after the embeddings and after each layer, when asked for. directions: for each layer, the
    two scans before the merge, when asked for; their `patches` (batch, seq_len) are the places of the tokens.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    directions: tuple[tuple[DirectionOutput, DirectionOutput], ...] | None = None


class BiMamba2PreTrainedModel(PreTrainedModel):
    """Initial values and gradient checkpointing."""

    config_class = BiMamba2Config
    config: BiMamba2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BiMamba2Layer"]  # noqa: RUF012 -- transformers' own class attribute
    _can_compile_fullgraph = False

    @classmethod
    def initial_values(cls, config: BiMamba2Config) -> tuple[InitialValue, ...]:
        """One row per kind of parameter; the first row whose ending fits a parameter's name counts."""
        std = config.initializer_range
        bound = 1.0 / math.sqrt(max(1, config.conv_kernel))
        low, high = config.A_init_range
        return (
            *(InitialValue(f"dt_bias{b}", "inverse_softplus_log_uniform", config.dt_min, config.dt_max) for b in _BOTH),
            *(InitialValue(f"A_log{b}", "log_uniform_A", low, high) for b in _BOTH),
            *(InitialValue(f".D{b}", "constant", 1.0) for b in _BOTH),
            *(InitialValue(f"conv1d{b}.weight", "uniform", -bound, bound) for b in _BOTH),
            *(InitialValue(f"mean_proj{b}.bias", "constant", 1.0) for b in _BOTH),
            InitialValue("norm.weight", "constant", 1.0),
            InitialValue("norm.bias", "constant", 0.0),
            InitialValue(".bias", "constant", 0.0),
            InitialValue(".weight", "normal", std),
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters that the module itself owns; transformers calls it once for each that owns some."""
        name = next(name for name, other in self.named_modules() if other is module)
        table = self.initial_values(self.config)
        for ending, parameter in module.named_parameters(recurse=False):
            apply_initial_value(parameter, find_initial_value(table, f"{name}.{ending}"), dt_init_floor=DT_INIT_FLOOR)


class BiMamba2Model(BiMamba2PreTrainedModel):
    """Token ids to hidden states and a sentence embedding."""

    def __init__(self, config: BiMamba2Config) -> None:
        super().__init__(config)
        self.embeddings = BiMamba2Embeddings(config)
        self.layers = nn.ModuleList([BiMamba2Layer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = cast(nn.Embedding, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_directions: bool = False,
        **kwargs: Any,
    ) -> BiMamba2Output:
        """input_ids (batch, seq_len), or inputs_embeds (batch, seq_len, hidden_size); attention_mask (batch, seq_len),
        0 = padding; token_type_ids (batch, seq_len), 0 without.

        With `output_directions`, features of a direction are in the order of its scan, over the row's own tokens, and
        padding has the place TOKEN_WITHOUT_PATCH.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give input_ids or inputs_embeds, one of the two.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        batch, seq_len = given.shape[:2]
        layout = _Layout.of(batch, seq_len, attention_mask)
        hidden = layout.pack(self.embeddings.tokens(input_ids, inputs_embeds, token_type_ids))
        hidden = self.embeddings(hidden)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states, directions = [hidden], []
        for layer in self.layers:
            hidden, features = layer(hidden, layout.turned, layout.lengths, output_directions)
            if wanted:
                states.append(hidden)
            if output_directions:
                directions.append(layout.directions(features))
        if values_are_checked(hidden):
            check_finite("BiMamba2Model", {"last_hidden_state": hidden})
        return BiMamba2Output(
            last_hidden_state=layout.unpack(hidden),
            pooler_output=self.pool(hidden, layout.lengths),
            hidden_states=tuple(map(layout.unpack, states)) if wanted else None,
            directions=tuple(directions) if output_directions else None,
        )

    def pool(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The mean of each row's first `lengths` (batch,) tokens, of length 1 where the configuration says so."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)  # a mean of thousands of tokens
        if lengths is None:
            mean = hidden.mean(dim=1, dtype=dtype)
        else:
            inside = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
            total = torch.where(inside[..., None], hidden.to(dtype), 0.0).sum(dim=1)
            mean = total / lengths[:, None].clamp(min=1)
        pooled = nn.functional.normalize(mean, dim=-1) if self.config.normalize else mean
        return pooled.to(hidden.dtype)


class BiMamba2Embeddings(nn.Module):
    """LayerNorm(word + type + position)."""

    def __init__(self, config: BiMamba2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.num_positions, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        """What does not depend on the place, (batch, seq_len, hidden_size)."""
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            return x + self.token_type_embeddings.weight[0]
        return x + self.token_type_embeddings(token_type_ids)

    def forward(self, x: Tensor) -> Tensor:
        """Add the position and normalise; x as `tokens` gives it, each row from its first token on."""
        last = self.position_embeddings.num_embeddings - 1
        places = torch.arange(x.shape[1], device=x.device).clamp(max=last)
        return self.norm(x + self.position_embeddings(places))


class BiMamba2Layer(GradientCheckpointingLayer):
    """norm(x + mixer(x)), then norm(x + mlp(x)), and each direction's output: BERT's order."""

    def __init__(self, config: BiMamba2Config) -> None:
        super().__init__()
        self.mixer = BidirectionalMamba2Mixer(
            config.hidden_size,
            num_heads=config.num_heads,
            head_dim=cast(int, config.head_dim),
            conv_kernel=config.conv_kernel,
            conv_activation=config.conv_activation,
            mean_term=config.mean_term,
            direction_weights=config.direction_weights,
            use_gate=config.use_gate,
            mixer_norm=config.mixer_norm,
            norm_eps=1e-6,
        )
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden: Tensor, turned: Tensor | None, lengths: Tensor | None = None, directions: bool = True
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        mixed, features = self.mixer(hidden, turned, lengths, directions=directions)
        hidden = norm_of_sum(self.mixer_norm, hidden, mixed)
        return norm_of_sum(self.mlp_norm, hidden, self.down_proj(self.act_fn(self.up_proj(hidden)))), features


@dataclass(frozen=True)
class _Layout:
    """Rows whose tokens come first and whose padding comes last; nothing is read back from the device.

    order (batch, seq_len): where each token stood in what was given; None = as given.
    """

    lengths: Tensor | None = None
    order: Tensor | None = None
    turned: Tensor | None = None

    @staticmethod
    def of(batch: int, seq_len: int, mask: Tensor | None) -> "_Layout":
        if mask is None:
            return _Layout()
        if tuple(mask.shape) != (batch, seq_len):
            raise InputError(f"attention_mask has shape {tuple(mask.shape)}; give ({batch}, {seq_len}), 0 for padding.")
        real = mask != 0
        lengths = real.sum(dim=1)
        order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        return _Layout(lengths, order, turned_rows(lengths, seq_len))

    def pack(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.gather(1, self.order[..., None].expand_as(x))

    def unpack(self, x: Tensor) -> Tensor:
        if self.order is None or self.lengths is None:
            return x
        inside = torch.arange(x.shape[1], device=x.device) < self.lengths[:, None]
        kept = torch.where(inside[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        return torch.zeros_like(x).scatter(1, self.order[..., None].expand_as(x), kept)

    def directions(self, features: tuple[Tensor, Tensor]) -> tuple[DirectionOutput, DirectionOutput]:
        batch, seq_len = features[0].shape[:2]
        places = torch.arange(seq_len, device=features[0].device)
        first = places.expand(batch, -1) if self.order is None else self.order
        second = first.flip(1) if self.turned is None else first.gather(1, self.turned)
        if self.lengths is not None:
            inside = places < self.lengths[:, None]
            first, second = (torch.where(inside, x, TOKEN_WITHOUT_PATCH) for x in (first, second))
        forward, backward = (
            DirectionOutput(name=name, features=one, patches=where, grid=(seq_len,))
            for name, one, where in ((FORWARD, features[0], first), (BACKWARD, features[1], second))
        )
        return forward, backward


_BOTH = ("_b", "")
