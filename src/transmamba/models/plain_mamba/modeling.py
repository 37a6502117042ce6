"""PlainMamba: a stem of convolutions, layers of one mixer each without class token or pyramid, the mean of the patches.

Notable: the mixer scans the image along four snakes with the same parameters; hidden states are in raster order.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from transmamba.models.initial_values import InitialValue
from transmamba.models.vision import (
    Directions,
    SequenceBackbone,
    VisionMambaClassifier,
    VisionMambaPreTrainedModel,
    linear_rows,
    norm_rows,
    state_space_rows,
    uniform_row,
)
from transmamba.modules import DirectionOutput, DropPath, PlainMambaMixer
from transmamba.modules.patches import check_pixels, drop_path_rates, resize_positions
from transmamba.modules.plain import normed_and_residual

from .configuration import PlainMambaConfig

STEM_CHANNELS = 64


class PlainMambaPreTrainedModel(VisionMambaPreTrainedModel):
    """What PlainMamba's models share."""

    config_class = PlainMambaConfig
    config: PlainMambaConfig
    _no_split_modules = ["PlainMambaLayer"]  # noqa: RUF012 -- transformers' own class attribute

    @classmethod
    def initial_values(cls, config: PreTrainedConfig) -> tuple[InitialValue, ...]:
        """Truncated normals for projections and positions, PyTorch's own for convolutions, Mamba-1's for the scan.

        The scan adds dt_proj's bias twice, so half of Mamba-1's initial value makes the steps those of Mamba-1.
        """
        std, rank = config.initializer_range, config.dt_rank
        stem_fan_in, patch = config.num_channels * 49, STEM_CHANNELS * (config.patch_size // 2) ** 2
        return (
            InitialValue("dt_proj.bias", "inverse_softplus_log_uniform", 0.001, 0.1, scale=0.5),
            *state_space_rows(rank),
            uniform_row("stem.0.weight", stem_fan_in),
            *(uniform_row(f"stem.{3 * i}.weight", STEM_CHANNELS * 9) for i in range(1, 1 + config.num_stem_convs)),
            *(row for i in range(1 + config.num_stem_convs) for row in norm_rows(f"stem.{3 * i + 1}")),
            uniform_row("patch_embed.proj.weight", patch),
            uniform_row("patch_embed.proj.bias", patch),
            uniform_row("conv2d.weight", config.conv_kernel**2),
            uniform_row("conv2d.bias", config.conv_kernel**2),
            *(uniform_row(f"local_convs.{layer}.0.weight", 9) for layer in config.layers_with_local_conv),
            *(row for layer in config.layers_with_local_conv for row in norm_rows(f"local_convs.{layer}.1")),
            *norm_rows("norm"),
            InitialValue("direction_Bs", "truncated_normal", std),
            InitialValue("pos_embed", "truncated_normal", std),
            *linear_rows("proj", std),
            *linear_rows("classifier", std),
        )


class PlainMambaModel(SequenceBackbone, PlainMambaPreTrainedModel):
    """The backbone: images to patches of one width."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__(config)
        self.num_features = config.hidden_size
        self.patch_embed = ConvolutionalPatchEmbedding(config)
        height, width = config.trained_grid
        self.pos_embed = nn.Parameter(torch.empty(1, height * width, config.hidden_size))
        rates = drop_path_rates(config.drop_path_rate, config.num_hidden_layers)
        self.layers = nn.ModuleList([PlainMambaLayer(config, rate) for rate in rates])
        # Outside the layers: recomputing a layer for its gradient must not update running statistics again.
        self.local_convs = nn.ModuleDict(
            {str(layer): _local_conv(config.hidden_size) for layer in config.layers_with_local_conv}
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.final_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def sequence_patches(self, pixel_values: Tensor) -> Tensor:
        """The raster index of every token of the sequence for such images: all patches, in raster order."""
        return self._patches(self.config.grid(*pixel_values.shape[-2:]), pixel_values.device)

    def pool(self, features: Tensor) -> Tensor:
        """What a head reads of forward_features: the mean."""
        return features.mean(dim=1)

    def _run(
        self, pixel_values: Tensor | None, keep_states: bool = False, keep_directions: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Directions, tuple[int, int]]:
        """(the last state, all states if kept, all directions if kept, the grid)."""
        pixel_values = check_pixels("PlainMambaModel", pixel_values, self.config.num_channels, 1)
        x, grid = self.patch_embed(pixel_values)
        x = x + resize_positions(self.pos_embed, self.config.trained_grid, grid)
        states, directions = [x], []
        for number, layer in enumerate(self.layers):
            x, found = cast(PlainMambaLayer, layer)(x, grid)
            if str(number) in self.local_convs:
                image = x.unflatten(1, grid).permute(0, 3, 1, 2)
                x = self.local_convs[str(number)](image).permute(0, 2, 3, 1).flatten(1, 2)
            if keep_states:
                states.append(x)
            if keep_directions:
                directions.append(found)
        return x, tuple(states), tuple(directions), grid

    def _patches(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.arange(math.prod(grid), device=device)


class PlainMambaForImageClassification(VisionMambaClassifier, PlainMambaPreTrainedModel):
    """PlainMamba with a linear head on the mean of the patches."""

    backbone_class = PlainMambaModel


class PlainMambaLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), and each direction's output."""

    def __init__(self, config: PlainMambaConfig, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = PlainMambaMixer(
            config.hidden_size,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            expand=config.expand,
            dt_rank=cast(int, config.dt_rank),
            conv_bias=config.conv_bias,
            bias=config.use_bias,
            scan_orders=tuple(config.scan_orders),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[DirectionOutput, ...]]:
        normed, hidden = normed_and_residual(self.norm, hidden)
        mixed, directions = self.mixer(normed, grid)
        return hidden + self.drop_path(mixed), directions


class ConvolutionalPatchEmbedding(nn.Module):
    """A 7 x 7 convolution that halves the image, 3 x 3 ones, then patches of what is left, padded to whole ones."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.size = config.patch_size // 2
        parts: list[nn.Module] = [*_conv_norm_relu(nn.Conv2d(config.num_channels, STEM_CHANNELS, 7, 2, 3, bias=False))]
        for _ in range(config.num_stem_convs):
            parts += _conv_norm_relu(nn.Conv2d(STEM_CHANNELS, STEM_CHANNELS, 3, 1, 1, bias=False))
        self.stem = nn.Sequential(*parts)
        self.proj = nn.Conv2d(STEM_CHANNELS, config.hidden_size, self.size, self.size)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))
        missing = (0, -x.shape[3] % self.size, 0, -x.shape[2] % self.size)
        x = self.proj(pad(x, missing) if any(missing) else x).permute(0, 2, 3, 1)
        return x.flatten(1, 2), (x.shape[1], x.shape[2])


def _conv_norm_relu(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(STEM_CHANNELS), nn.ReLU(inplace=True)]


def _local_conv(hidden_size: int) -> nn.Sequential:
    conv = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(hidden_size), nn.GELU())
