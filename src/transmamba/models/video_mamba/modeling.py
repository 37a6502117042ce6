"""VideoMamba: patches of images or of all frames of a video behind one class token, bidirectional mixers.

Notable: as ViM, with the class token first and the sum of directions as it is. Videos are (batch, frames, channels,
height, width), as everywhere in transformers.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from transmamba.errors import InputError
from transmamba.models.initial_values import InitialValue
from transmamba.models.vision import (
    Directions,
    SequenceBackbone,
    VisionMambaClassifier,
    VisionMambaPreTrainedModel,
    bidirectional_rows,
    linear_rows,
    uniform_row,
)
from transmamba.modules import BidirectionalMambaMixer, DropPath, PatchEmbedding, scan_order
from transmamba.modules.bidirectional_mamba import both_directions
from transmamba.modules.patches import (
    check_pixels,
    drop_path_rates,
    patches_with_token,
    resize_frames,
    resize_positions,
)
from transmamba.modules.scan_orders import TOKEN_WITHOUT_PATCH

from .configuration import VideoMambaConfig


class VideoMambaPreTrainedModel(VisionMambaPreTrainedModel):
    """What VideoMamba's models share."""

    config_class = VideoMambaConfig
    config: VideoMambaConfig
    _no_split_modules = ["VideoMambaLayer"]  # noqa: RUF012 -- transformers' own class attribute

    @classmethod
    def initial_values(cls, config: PreTrainedConfig) -> tuple[InitialValue, ...]:
        """The published code's: truncated normals and Mamba-1's; the class token and frames begin at zero."""
        std, patch = config.initializer_range, config.num_channels * config.patch_size**2
        if config.num_frames is not None:
            patch *= config.tubelet_size
        return (
            *linear_rows("in_proj", std),
            *linear_rows("x_proj", std),
            *linear_rows("x_proj_b", std),
            *bidirectional_rows(config),
            uniform_row("patch_embed.proj.weight", patch),
            uniform_row("patch_embed.proj.bias", patch),
            InitialValue("temporal_pos_embedding", "constant", 0.0),
            InitialValue("pos_embed", "truncated_normal", std),
            InitialValue("cls_token", "constant", 0.0),
            *linear_rows("classifier", std),
        )


class VideoMambaModel(SequenceBackbone, VideoMambaPreTrainedModel):
    """The backbone: images or videos to a class token and the patches of all frames."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__(config)
        self.num_features = config.hidden_size
        height, width = config.trained_grid
        self.temporal_pos_embedding: nn.Parameter | None = None
        if config.num_frames is None:
            stride = cast(int, config.patch_stride)
            self.patch_embed: nn.Module = PatchEmbedding(
                config.num_channels, config.hidden_size, config.patch_size, stride
            )
        else:
            self.patch_embed = TubeletEmbedding(config)
            tubelets = config.num_frames // config.tubelet_size
            self.temporal_pos_embedding = nn.Parameter(torch.empty(1, tubelets, config.hidden_size))
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.empty(1, height * width + 1, config.hidden_size))
        rates = drop_path_rates(config.drop_path_rate, config.num_hidden_layers)
        self.layers = nn.ModuleList([VideoMambaLayer(config, rate) for rate in rates])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def sequence_patches(self, pixel_values: Tensor) -> Tensor:
        """The raster index of every token for such inputs, frame after frame; TOKEN_WITHOUT_PATCH: the class token."""
        grid: tuple[int, ...] = self.config.grid(*pixel_values.shape[-2:])
        if self.config.num_frames is not None:
            grid = (pixel_values.shape[1] // self.config.tubelet_size, *grid)
        return self._patches(grid, pixel_values.device)

    def pool(self, features: Tensor) -> Tensor:
        """What a head reads of forward_features: the class token."""
        return features[:, 0]

    def _run(
        self, pixel_values: Tensor | None, keep_states: bool = False, keep_directions: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Directions, tuple[int, ...]]:
        """(the last state, all states if kept, all directions if kept, the grid)."""
        config = self.config
        dimensions = 4 if config.num_frames is None else 5
        pixel_values = check_pixels(
            "VideoMambaModel", pixel_values, config.num_channels, config.patch_size, dimensions=dimensions
        )
        x, grid = self.patch_embed(pixel_values)
        token, positions = self.pos_embed.split((1, self.pos_embed.shape[1] - 1), dim=1)
        positions = resize_positions(positions, config.trained_grid, grid[-2:])
        if self.temporal_pos_embedding is not None:
            frames = resize_frames(self.temporal_pos_embedding, grid[0])
            positions = (positions.unsqueeze(1) + frames.unsqueeze(2)).flatten(1, 2)
        x = scan_order(cast(str, config.scan_order), grid, x.device).scan(x + positions, 1)
        x = torch.cat([(self.cls_token + token).expand(len(x), -1, -1), x], dim=1)
        if config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        patches = self._patches(grid, x.device)
        states, directions = [x], []
        for layer in self.layers:
            x, features = cast(VideoMambaLayer, layer)(x)
            if keep_states:
                states.append(x)
            if keep_directions:
                directions.append(both_directions(cast(str, config.scan_order), features, patches, grid))
        return x, tuple(states), tuple(directions), grid

    def _patches(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        order = scan_order(cast(str, self.config.scan_order), grid, device).order
        return patches_with_token(order, 0, TOKEN_WITHOUT_PATCH)


class VideoMambaForImageClassification(VisionMambaClassifier, VideoMambaPreTrainedModel):
    """VideoMamba for images, with a linear head on the class token."""

    backbone_class = VideoMambaModel

    def __init__(self, config: VideoMambaConfig) -> None:
        if config.num_frames is not None:
            raise InputError(
                f"num_frames={config.num_frames} is a model of videos; use VideoMambaForVideoClassification, or None."
            )
        super().__init__(config)


class VideoMambaForVideoClassification(VisionMambaClassifier, VideoMambaPreTrainedModel):
    """VideoMamba for videos, with a linear head on the class token."""

    backbone_class = VideoMambaModel

    def __init__(self, config: VideoMambaConfig) -> None:
        if config.num_frames is None:
            raise InputError("num_frames=None is a model of images; use VideoMambaForImageClassification, or give it.")
        super().__init__(config)


class VideoMambaLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), and each direction's output."""

    def __init__(self, config: VideoMambaConfig, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = BidirectionalMambaMixer(
            config.hidden_size,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            expand=config.expand,
            dt_rank=cast(int, config.dt_rank),
            conv_bias=config.conv_bias,
            bias=config.use_bias,
            divide_outputs=False,
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, directions = self.mixer(self.norm(hidden.to(self.norm.weight.dtype)))
        return hidden + self.drop_path(mixed), directions


class TubeletEmbedding(nn.Module):
    """Patches of a few frames to vectors: (batch, frames, channels, height, width) -> ((batch, patches, hidden), grid).

    Frame after frame; frames, rows and columns that are left over at the end are not read.
    """

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__()
        size, stride = config.patch_size, cast(int, config.patch_stride)
        self.proj = nn.Conv3d(
            config.num_channels,
            config.hidden_size,
            kernel_size=(config.tubelet_size, size, size),
            stride=(config.tubelet_size, stride, stride),
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        tubelet = self.proj.kernel_size[0]
        if pixel_values.shape[1] < tubelet:
            raise InputError(
                f"VideoMambaModel: videos of {pixel_values.shape[1]} frames hold no whole tubelet; "
                f"give at least {tubelet}."
            )
        x = self.proj(pixel_values.transpose(1, 2))
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3], x.shape[4])
