"""VMamba: stages of falling resolution, blocks of a cross-scan mixer and an MLP, the mean of the last stage.

Notable: channels stand last everywhere; the published channel-first models are the same functions in another layout.
States and directions are per block, those of all stages in a row, and their grids shrink from stage to stage.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from transmamba.models.initial_values import InitialValue
from transmamba.models.vision import (
    Directions,
    VisionMambaBackbone,
    VisionMambaClassifier,
    VisionMambaPreTrainedModel,
    chosen_layers,
    default_dt_rank,
    linear_rows,
    norm_rows,
    uniform_row,
)
from transmamba.modules import CrossScanMixer, DirectionOutput, DropPath, PlainMLP
from transmamba.modules.patches import check_pixels, drop_path_rates

from .configuration import VMambaConfig


class VMambaPreTrainedModel(VisionMambaPreTrainedModel):
    """What VMamba's models share."""

    config_class = VMambaConfig
    config: VMambaConfig
    _no_split_modules = ["VMambaBlock"]  # noqa: RUF012 -- transformers' own class attribute

    @classmethod
    def initial_values(cls, config: PreTrainedConfig) -> tuple[InitialValue, ...]:
        """The published code's: truncated normals for projections, Mamba-1's for the scan, PyTorch's own elsewhere."""
        std, first, stride = config.initializer_range, config.hidden_sizes[0], config.patch_size // 2
        rows = [
            *linear_rows("in_proj", std),
            *linear_rows("out_proj", std),
            *linear_rows("up_proj", std),
            *linear_rows("down_proj", std),
            *linear_rows("classifier", std),
            *linear_rows("reduction", std),
            InitialValue("A_logs", "log_counting"),
            InitialValue("Ds", "constant", 1.0),
            InitialValue("dt_projs_bias", "inverse_softplus_log_uniform", 0.001, 0.1),
            *norm_rows("norm"),
            *norm_rows("norm1"),
            *norm_rows("norm2"),
            uniform_row("conv2d.weight", config.conv_kernel**2),
            uniform_row("conv2d.bias", config.conv_kernel**2),
        ]
        kernels = {"proj": config.num_channels * config.patch_size**2}
        if config.patch_embedding == "convolutions":
            size = (stride + 1) ** 2
            kernels = {"conv1": config.num_channels * size, "conv2": first // 2 * size}
        rows += [
            uniform_row(f"patch_embed.{name}.{part}", fan)
            for name, fan in kernels.items()
            for part in ("weight", "bias")
        ]
        size = 9 if config.downsampling == "conv3" else 4
        for stage, width in enumerate(config.hidden_sizes):
            channels = int(config.expand * width)
            rows += [
                *(uniform_row(f"stages.{stage}.downsample.conv.{part}", width * size) for part in ("weight", "bias")),
                *(
                    row
                    for block in range(config.depths[stage])
                    for row in (
                        uniform_row(f"stages.{stage}.blocks.{block}.mixer.x_proj_weight", channels),
                        uniform_row(f"stages.{stage}.blocks.{block}.mixer.dt_projs_weight", default_dt_rank(width)),
                    )
                ),
            ]
        return tuple(rows)


class VMambaModel(VisionMambaBackbone, VMambaPreTrainedModel):
    """The backbone: images to the positions of its last stage, and to a pyramid of maps."""

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__(config)
        self.num_features = config.hidden_size
        embedding = TwoConvolutions if config.patch_embedding == "convolutions" else OneConvolution
        self.patch_embed = embedding(config)
        rates = iter(drop_path_rates(config.drop_path_rate, config.num_hidden_layers))
        self.stages = nn.ModuleList(
            [
                VMambaStage(config, stage, [next(rates) for _ in range(depth)])
                for stage, depth in enumerate(config.depths)
            ]
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def pool(self, features: Tensor) -> Tensor:
        """What a head reads of forward_features: the mean."""
        return features.mean(dim=1)

    def feature_maps(self, pixel_values: Tensor, layers: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """(batch, hidden_size, height, width) of these stages before they are downsampled; the last one normalised.

        layers: stages from 0, negative from the end; None: all, at a 4th to a 32nd of the image.
        """
        chosen = chosen_layers(range(len(self.stages)) if layers is None else layers, len(self.stages))
        last, states, _, _ = self._run(pixel_values, keep_states=True)
        ends = [sum(self.config.depths[: stage + 1]) for stage in range(len(self.stages))]
        maps = [states[end] for end in ends[:-1]] + [self._normed(last)]
        return tuple(maps[stage].permute(0, 3, 1, 2).contiguous() for stage in chosen)

    def _run(
        self, pixel_values: Tensor | None, keep_states: bool = False, keep_directions: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Directions, tuple[int, ...]]:
        """(the last state (b, h, w, c), those around each block if kept, all directions if kept, the grid)."""
        pixel_values = check_pixels(
            "VMambaModel", pixel_values, self.config.num_channels, self.patch_embed.smallest(len(self.stages))
        )
        x = self.patch_embed(pixel_values)
        states, directions = [x], []
        for stage in self.stages:
            stage = cast(VMambaStage, stage)
            for block in stage.blocks:
                x, found = block(x)
                if keep_states:
                    states.append(x)
                if keep_directions:
                    directions.append(found)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return x, tuple(states), tuple(directions), tuple(x.shape[1:3])


class VMambaForImageClassification(VisionMambaClassifier, VMambaPreTrainedModel):
    """VMamba with a linear head on the mean of the last stage."""

    backbone_class = VMambaModel


class VMambaStage(nn.Module):
    """Blocks of one resolution, and the way to the next; the model runs them."""

    def __init__(self, config: VMambaConfig, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        width = config.hidden_sizes[stage]
        self.blocks = nn.ModuleList([VMambaBlock(config, width, rate) for rate in drop_paths])
        self.downsample: nn.Module | None = None
        if stage + 1 < len(config.depths):
            form = PatchMerging if config.downsampling == "merge" else StridedConvolution
            self.downsample = form(config, width, config.hidden_sizes[stage + 1])


class VMambaBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)); no MLP where mlp_ratio is 0. And each direction's output."""

    def __init__(self, config: VMambaConfig, width: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mixer = CrossScanMixer(
            width,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            expand=config.expand,
            dt_rank=default_dt_rank(width),
            conv_bias=config.conv_bias,
            bias=config.use_bias,
            use_gate=config.use_gate,
            norm_eps=config.norm_eps,
        )
        self.drop_path = DropPath(drop_path)
        self.mlp: PlainMLP | None = None
        if config.mlp_ratio:
            self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
            self.mlp = PlainMLP(width, int(width * config.mlp_ratio), "gelu", bias=True)

    def forward(self, hidden: Tensor) -> tuple[Tensor, tuple[DirectionOutput, ...]]:
        mixed, directions = self.mixer(self.norm1(hidden))
        hidden = hidden + self.drop_path(mixed)
        if self.mlp is not None:
            hidden = hidden + self.drop_path(self.mlp(self.norm2(hidden)))
        return hidden, directions


class OneConvolution(nn.Module):
    """Disjoint patches: (b, c, h, w) -> (b, h', w', width)."""

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_sizes[0], config.patch_size, config.patch_size)
        self.norm = nn.LayerNorm(config.hidden_sizes[0], eps=config.norm_eps)
        self.patch_size, self.halves = config.patch_size, config.downsampling == "conv2"

    def smallest(self, stages: int) -> int:
        """Pixels that leave a position in the last stage."""
        return self.patch_size * (2 ** (stages - 1) if self.halves else 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.norm(self.proj(pixel_values).permute(0, 2, 3, 1))


class TwoConvolutions(nn.Module):
    """Two overlapping convolutions of half a patch's stride each: (b, c, h, w) -> (b, h', w', width)."""

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__()
        width, stride = config.hidden_sizes[0], config.patch_size // 2
        self.conv1 = nn.Conv2d(config.num_channels, width // 2, stride + 1, stride, 1)
        self.norm1 = nn.LayerNorm(width // 2, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(width // 2, width, stride + 1, stride, 1)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.patch_size, self.halves = config.patch_size, config.downsampling == "conv2"

    def smallest(self, stages: int) -> int:
        """Pixels that leave a position in the last stage."""
        return self.patch_size * (2 ** (stages - 1) if self.halves else 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.norm1(self.conv1(pixel_values).permute(0, 2, 3, 1))
        return self.norm2(self.conv2(gelu(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class StridedConvolution(nn.Module):
    """Half the sides by a convolution of 3 x 3 or 2 x 2, then a norm."""

    def __init__(self, config: VMambaConfig, width: int, wider: int) -> None:
        super().__init__()
        size, padding = (3, 1) if config.downsampling == "conv3" else (2, 0)
        self.conv = nn.Conv2d(width, wider, size, 2, padding)
        self.norm = nn.LayerNorm(wider, eps=config.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.conv(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Half the sides by four patches side by side, a norm and a projection; odd sides get a row of zeros."""

    def __init__(self, config: VMambaConfig, width: int, wider: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=config.norm_eps)
        self.reduction = nn.Linear(4 * width, wider, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = pad(hidden, (0, 0, 0, hidden.shape[2] % 2, 0, hidden.shape[1] % 2))
        corners = [hidden[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, dim=-1)))
