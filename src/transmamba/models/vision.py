"""What the vision backbones share: outputs, initial values by table, checks of sizes, and the classifier on top.

A backbone's sequence may hold a class token and may be in another order than the image's; `split_tokens` brings either
back. Directions are what each scan gives before the merge, for whoever wants to match them to a teacher's tokens.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from transmamba.errors import InputError
from transmamba.modules.scan_orders import TOKEN_WITHOUT_PATCH, DirectionOutput
from transmamba.ops.checks import check_finite, values_are_checked

from .initial_values import InitialValue, apply_initial_value, find_initial_value

Directions = tuple[tuple[DirectionOutput, ...], ...]
DT_INIT_FLOOR = 1e-4  # of Mamba-1


@dataclass
class VisionMambaOutput(ModelOutput):
    """What a backbone returns.

    last_hidden_state: after the final norm, (batch, seq_len, hidden_size); of VMamba, the positions of the last stage.
    pooler_output: what a head reads, (batch, hidden_size).
    hidden_states: the residual stream before the first layer and after each, when asked for.
    directions: for each layer, its directions before the merge, when asked for.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    directions: Directions | None = None


@dataclass
class VisionMambaClassifierOutput(ModelOutput):
    """A backbone's output with logits (batch, num_labels), and the loss where labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    directions: Directions | None = None


class VisionMambaPreTrainedModel(PreTrainedModel):
    """What all vision models share: the kind of input, initial values, gradient checkpointing."""

    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = False

    @classmethod
    def initial_values(cls, config: PreTrainedConfig) -> tuple[InitialValue, ...]:
        """One row per kind of parameter; the first row whose ending fits a parameter's name counts."""
        raise NotImplementedError

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters that the module itself owns; transformers calls it once for each that owns some."""
        name = next(name for name, other in self.named_modules() if other is module)
        table = self.initial_values(self.config)
        for ending, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{ending}" if name else ending
            apply_initial_value(parameter, find_initial_value(table, full), dt_init_floor=DT_INIT_FLOOR)
        if isinstance(module, nn.BatchNorm2d):
            super()._init_weights(module)  # its running statistics


class VisionMambaBackbone(VisionMambaPreTrainedModel):
    """A backbone's calls, around what each computes: `_run` before the final norm, and `pool`."""

    num_features: int

    def forward_features(self, pixel_values: Tensor) -> Tensor:
        """The sequence after the final norm, (batch, seq_len, hidden_size); of VMamba, its last stage."""
        return self._sequence(self._normed(self._run(pixel_values)[0]))

    def pool(self, features: Tensor) -> Tensor:
        """What a head reads of forward_features, (batch, hidden_size)."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_directions: bool = False,
        **kwargs: Any,
    ) -> VisionMambaOutput:
        """pixel_values: normalised images (batch, num_channels, height, width) of any size of at least one patch, or
        of a model of videos (batch, frames, num_channels, height, width).
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        last, states, directions, _ = self._run(pixel_values, bool(wanted), output_directions)
        hidden = self._sequence(self._normed(last))
        check_output(type(self).__name__, hidden)
        return VisionMambaOutput(
            last_hidden_state=hidden,
            pooler_output=self.pool(hidden),
            hidden_states=tuple(map(self._sequence, states)) if wanted else None,
            directions=directions if output_directions else None,
        )

    def _run(
        self, pixel_values: Tensor | None, keep_states: bool = False, keep_directions: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Directions, tuple[int, ...]]:
        """(the last state, the first and that after each layer if kept, all directions if kept, the last grid)."""
        raise NotImplementedError

    def _normed(self, state: Tensor) -> Tensor:
        norm = cast(nn.LayerNorm, self.norm)
        return norm(state.to(norm.weight.dtype))

    def _sequence(self, state: Tensor) -> Tensor:
        """(batch, seq_len, width), where states are (batch, height, width, channels) inside."""
        return state if state.dim() == 3 else state.flatten(1, 2)


class SequenceBackbone(VisionMambaBackbone):
    """A backbone of one scale: all its layers hold the same tokens, of the patches `_patches`."""

    def feature_maps(self, pixel_values: Tensor, layers: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """(batch, hidden_size, [frames,] height, width) after each of these layers; the last one normalised.

        layers: from 0, negative from the end; None: the ends of the four quarters of the network.
        """
        count = self.config.num_hidden_layers
        chosen = chosen_layers(layers, count)
        _, states, _, grid = self._run(pixel_values, keep_states=True)
        patches = self._patches(grid, pixel_values.device)
        wanted = [self._normed(states[i + 1]) if i == count - 1 else states[i + 1] for i in chosen]
        return tuple(as_map(split_tokens(state, patches)[1], grid) for state in wanted)

    def _patches(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        """The raster index of every token, TOKEN_WITHOUT_PATCH for others."""
        raise NotImplementedError


class VisionMambaClassifier(VisionMambaPreTrainedModel):
    """A backbone and a linear head. Subclasses name the backbone."""

    backbone_class: ClassVar[type[VisionMambaBackbone]]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.backbone = self.backbone_class(config)
        width = self.backbone.num_features
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    def forward_features(self, pixel_values: Tensor) -> Tensor:
        """The backbone's last_hidden_state."""
        return self.backbone.forward_features(pixel_values)

    def feature_maps(self, pixel_values: Tensor, layers: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """The backbone's feature_maps."""
        return cast(Any, self.backbone).feature_maps(pixel_values, layers)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_directions: bool = False,
        **kwargs: Any,
    ) -> VisionMambaClassifierOutput:
        """Return logits, and the cross-entropy with labels (batch,), or (batch, num_labels) where they are soft."""
        out = self.backbone(
            pixel_values,
            output_hidden_states=output_hidden_states,
            output_directions=output_directions,
            return_dict=True,
            **kwargs,
        )
        logits = self.classifier(out.pooler_output)
        loss = None
        if labels is not None:
            _check_labels(labels, logits)
            loss = nn.functional.cross_entropy(logits.float(), labels.to(logits.device))
        return VisionMambaClassifierOutput(loss=loss, logits=logits, **out)


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.is_floating_point() and labels.shape == logits.shape:
        return
    if labels.is_floating_point() or labels.shape != logits.shape[:1]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; give ({len(logits)},) whole numbers, "
            f"or {tuple(logits.shape)} probabilities."
        )
    if (
        values_are_checked(labels)
        and labels.numel()
        and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]
    ):
        raise InputError(
            f"labels go from {int(labels.min())} to {int(labels.max())} and the model has {logits.shape[1]} classes; "
            "build it with num_labels to match."
        )


def split_tokens(sequence: Tensor, patches: Tensor) -> tuple[Tensor | None, Tensor]:
    """(the class token (batch, hidden_size) or None, the patches (batch, patches, hidden_size) in raster order).

    patches: the raster index at each step, as a backbone's `sequence_patches` gives.
    """
    is_patch = patches != TOKEN_WITHOUT_PATCH
    kept = is_patch.nonzero().squeeze(1)
    others = (~is_patch).nonzero().squeeze(1)
    token = sequence[:, others[0]] if len(others) else None
    return token, sequence[:, kept[torch.argsort(patches[kept])]]


def as_map(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """(batch, patches, hidden_size) -> (batch, hidden_size, height, width)."""
    return patches.transpose(1, 2).unflatten(2, tuple(grid)).contiguous()


def chosen_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    """The layers whose maps are asked for, from 0; None: the ends of the four quarters of the network."""
    if layers is None:
        return sorted({max(0, count * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})
    chosen = [layer + count if layer < 0 else layer for layer in layers]
    for given, layer in zip(layers, chosen, strict=True):
        if not 0 <= layer < count:
            raise InputError(f"there is no layer {given}; this model has {count}, from 0 to {count - 1}.")
    return chosen


def check_output(model: str, hidden: Tensor) -> None:
    """Raise InputError where the model's last hidden state holds NaN: read once a forward, in the place of every op."""
    if values_are_checked(hidden):
        check_finite(model, {"last_hidden_state": hidden})


def sides(image_size: Any) -> tuple[int, int]:
    """image_size as (height, width)."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


def check_sizes(config: PreTrainedConfig, positive: Iterable[str]) -> None:
    """Raise InputError unless these fields are at least 1, image_size one or two, and drop_path_rate a probability."""
    for name in positive:
        if getattr(config, name) < 1:
            raise InputError(f"{name}={getattr(config, name)} must be at least 1.")
    size = config.image_size
    is_pair = isinstance(size, list | tuple) and len(size) == 2
    if not (isinstance(size, int) or is_pair) or min(sides(size)) < 1:
        raise InputError(f"image_size={size!r} must be a whole number, or [height, width], of at least 1.")
    if not 0 <= config.drop_path_rate < 1:
        raise InputError(f"drop_path_rate={config.drop_path_rate} must be at least 0 and less than 1.")


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise InputError unless the value is one of the known ones."""
    if value not in known:
        raise InputError(f"{name}={value!r} is unknown; choose {' or '.join(map(repr, known))}.")


def default_dt_rank(hidden_size: int) -> int:
    """Mamba-1's: a sixteenth of the width, rounded up."""
    return math.ceil(hidden_size / 16)


def state_space_rows(dt_rank: int) -> tuple[InitialValue, ...]:
    """Mamba-1's initial values of what a scan reads: A = 1, 2, ..., D = 1, steps log-uniform between 0.001 and 0.1."""
    bound = dt_rank**-0.5
    return (
        InitialValue("A_log", "log_counting"),
        InitialValue("A_b_log", "log_counting"),
        InitialValue(".D", "constant", 1.0),
        InitialValue(".D_b", "constant", 1.0),
        InitialValue("dt_proj.weight", "uniform", -bound, bound),
        InitialValue("dt_proj_b.weight", "uniform", -bound, bound),
        InitialValue("dt_proj.bias", "inverse_softplus_log_uniform", 0.001, 0.1),
        InitialValue("dt_proj_b.bias", "inverse_softplus_log_uniform", 0.001, 0.1),
    )


def norm_rows(name: str) -> tuple[InitialValue, ...]:
    """Of a norm: ones and zeros."""
    return InitialValue(f"{name}.weight", "constant", 1.0), InitialValue(f"{name}.bias", "constant", 0.0)


def linear_rows(name: str, std: float) -> tuple[InitialValue, ...]:
    """Of a projection: a truncated normal, and no bias."""
    return InitialValue(f"{name}.weight", "truncated_normal", std), InitialValue(f"{name}.bias", "constant", 0.0)


def uniform_row(ending: str, fan_in: int, gain: float = 1.0) -> InitialValue:
    """Uniform within gain / sqrt(fan_in); with a gain of 1, PyTorch's own initial value."""
    return InitialValue(ending, "uniform", -gain * fan_in**-0.5, gain * fan_in**-0.5)


def bidirectional_rows(config: PreTrainedConfig) -> tuple[InitialValue, ...]:
    """Of layers with a bidirectional Mamba mixer, as ViM and VideoMamba publish them.

    The output projections have a standard deviation smaller by sqrt(layers), as in GPT-2.
    """
    hidden, channels = config.hidden_size, config.expand * config.hidden_size
    return (
        *state_space_rows(config.dt_rank),
        uniform_row("in_proj.weight", hidden),
        uniform_row("x_proj.weight", channels),
        uniform_row("x_proj_b.weight", channels),
        uniform_row("out_proj.weight", channels, gain=config.num_hidden_layers**-0.5),
        InitialValue("in_proj.bias", "constant", 0.0),
        InitialValue("out_proj.bias", "constant", 0.0),
        *(uniform_row(f"conv1d{way}.{part}", config.conv_kernel) for way in ("", "_b") for part in ("weight", "bias")),
        InitialValue("norm.weight", "constant", 1.0),
    )
