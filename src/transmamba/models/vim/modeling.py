"""Vision Mamba (ViM): patches and a class token in the middle of them, layers of one bidirectional mixer each.

Notable: the published code hands hidden states and residual on separately, to fuse addition and norm; that is the plain
pre-norm residual, which is what is computed here.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from transmamba.models.initial_values import InitialValue
from transmamba.models.vision import (
    Directions,
    SequenceBackbone,
    VisionMambaClassifier,
    VisionMambaPreTrainedModel,
    bidirectional_rows,
    linear_rows,
)
from transmamba.modules import BidirectionalMambaMixer, DropPath, PatchEmbedding, scan_order
from transmamba.modules.bidirectional_mamba import both_directions
from transmamba.modules.patches import check_pixels, drop_path_rates, patches_with_token, resize_positions
from transmamba.modules.plain import normed_and_residual
from transmamba.modules.scan_orders import TOKEN_WITHOUT_PATCH

from .configuration import VimConfig


class VimPreTrainedModel(VisionMambaPreTrainedModel):
    """What ViM's models share."""

    config_class = VimConfig
    config: VimConfig
    _no_split_modules = ["VimLayer"]  # noqa: RUF012 -- transformers' own class attribute

    @classmethod
    def initial_values(cls, config: PreTrainedConfig) -> tuple[InitialValue, ...]:
        """The published code's: PyTorch's own for projections, Mamba-1's for the scan, LeCun's for the patches."""
        std, patch = config.initializer_range, config.num_channels * config.patch_size**2
        return (
            *bidirectional_rows(config),
            InitialValue("patch_embed.proj.weight", "truncated_normal", patch**-0.5),
            InitialValue("patch_embed.proj.bias", "constant", 0.0),
            InitialValue("pos_embed", "truncated_normal", std),
            InitialValue("cls_token", "truncated_normal", std),
            *linear_rows("classifier", std),
        )


class VimModel(SequenceBackbone, VimPreTrainedModel):
    """The backbone: images to a sequence of patches with a class token among them."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__(config)
        self.num_features = config.hidden_size
        self.patch_embed = PatchEmbedding(
            config.num_channels, config.hidden_size, config.patch_size, cast(int, config.patch_stride)
        )
        has_token = config.class_token != "none"
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if has_token else None
        height, width = config.trained_grid
        self.pos_embed = nn.Parameter(torch.empty(1, height * width + has_token, config.hidden_size))
        rates = drop_path_rates(config.drop_path_rate, config.num_hidden_layers)
        self.layers = nn.ModuleList([VimLayer(config, rate) for rate in rates])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def sequence_patches(self, pixel_values: Tensor) -> Tensor:
        """The raster index of every token of the sequence for such images; TOKEN_WITHOUT_PATCH is the class token."""
        return self._patches(self.config.grid(*pixel_values.shape[-2:]), pixel_values.device)

    def pool(self, features: Tensor) -> Tensor:
        """What a head reads of forward_features: the class token, or the mean where there is none."""
        at = self.config.class_token_position(features.shape[1] - 1)
        return features.mean(dim=1) if at is None else features[:, at]

    def _run(
        self, pixel_values: Tensor | None, keep_states: bool = False, keep_directions: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Directions, tuple[int, int]]:
        """(the last state, all states if kept, all directions if kept, the grid)."""
        pixel_values = check_pixels("VimModel", pixel_values, self.config.num_channels, self.config.patch_size)
        x, grid = self.patch_embed(pixel_values)
        token_position, token_embedding = self._positions(grid)
        x = scan_order(self.config.scan_order, grid, x.device).scan(x + token_position, 1)
        at = self.config.class_token_position(x.shape[1])
        if self.cls_token is not None and token_embedding is not None:
            token = (self.cls_token + token_embedding).expand(len(x), -1, -1)
            x = torch.cat([x[:, :at], token, x[:, at:]], dim=1)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        patches = self._patches(grid, x.device)
        states, directions = [x], []
        for layer in self.layers:
            x, features = cast(VimLayer, layer)(x)
            if keep_states:
                states.append(x)
            if keep_directions:
                directions.append(both_directions(self.config.scan_order, features, patches, grid))
        return x, tuple(states), tuple(directions), grid

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The position embeddings of the patches, in raster order at this grid, and of the class token."""
        trained = self.config.trained_grid
        at = self.config.class_token_position(trained[0] * trained[1])
        if at is None:
            return resize_positions(self.pos_embed, trained, grid), None
        before, token, after = self.pos_embed.split((at, 1, self.pos_embed.shape[1] - at - 1), dim=1)
        return resize_positions(torch.cat([before, after], dim=1), trained, grid), token

    def _patches(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        order = scan_order(self.config.scan_order, grid, device).order
        at = self.config.class_token_position(len(order))
        return order if at is None else patches_with_token(order, at, TOKEN_WITHOUT_PATCH)


class VimForImageClassification(VisionMambaClassifier, VimPreTrainedModel):
    """ViM with a linear head on the class token."""

    backbone_class = VimModel


class VimLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), and each direction's output."""

    def __init__(self, config: VimConfig, drop_path: float) -> None:
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
            divide_outputs=config.divide_outputs,
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        normed, hidden = normed_and_residual(self.norm, hidden)
        mixed, directions = self.mixer(normed)
        return hidden + self.drop_path(mixed), directions
