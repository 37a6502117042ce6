"""Published VideoMamba checkpoints (OpenGVLab/VideoMamba), of images and of videos.

Those of images have ViM's names, so they must be asked for by name. With num_frames they become models of videos.
"""

from typing import Any

import torch
from torch import Tensor

from transmamba.conversion.plan import Move
from transmamba.models import (
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VisionMambaClassifier,
)

from .table import PublishedFamily, Shapes, shape_of, side_of
from .vim import ONCE, bidirectional_moves, told_by_mixer

FRAMES = ("temporal_pos_embedding", "backbone.temporal_pos_embedding")


def video_mamba_configuration(path: str, shapes: Shapes, fields: dict[str, Any]) -> VideoMambaConfig:
    """The sizes that the tensors tell; fields replace them."""
    hidden, num_channels, *kernel = shape_of(path, shapes, "patch_embed.proj.weight")
    told = told_by_mixer(path, shapes, hidden) | {"patch_size": kernel[-1], "num_channels": num_channels}
    if FRAMES[0] in shapes:
        tubelet = kernel[0] if len(kernel) == 3 else 1
        told |= {"tubelet_size": tubelet, "num_frames": tubelet * shapes[FRAMES[0]][1]}
    if "image_size" not in fields:
        side = side_of(path, shape_of(path, shapes, "pos_embed")[1] - 1)
        told["image_size"] = (side - 1) * (fields.get("patch_stride") or kernel[-1]) + kernel[-1]
    return VideoMambaConfig(**(told | fields))


def video_mamba_moves(config: VideoMambaConfig, shapes: Shapes) -> list[Move]:
    """The table for a model of these sizes."""
    once = (*ONCE, *((FRAMES,) if config.num_frames is not None else ()))
    moves = [Move(source=theirs, target=ours) for theirs, ours in once]
    return moves + bidirectional_moves(config.num_hidden_layers, config.conv_bias, config.use_bias)


def inflate(config: VideoMambaConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model of images as those of a model of videos: middle frames are read, and frames are alike."""
    kernel = weights.get("patch_embed.proj.weight")
    if config.num_frames is None or kernel is None or kernel.dim() == 5:
        return weights
    deep = kernel.new_zeros(*kernel.shape[:2], config.tubelet_size, *kernel.shape[2:])
    deep[:, :, config.tubelet_size // 2] = kernel
    tubelets = config.num_frames // config.tubelet_size
    return weights | {"patch_embed.proj.weight": deep, FRAMES[0]: torch.zeros(1, tubelets, config.hidden_size)}


def video_mamba_model(config: VideoMambaConfig) -> VisionMambaClassifier:
    """For images or for videos."""
    if config.num_frames is None:
        return VideoMambaForImageClassification(config)
    return VideoMambaForVideoClassification(config)


VIDEO_MAMBA = PublishedFamily(
    name="video_mamba",
    signs=(r"layers\.0\.mixer\.A_b_log", r"temporal_pos_embedding"),
    absent=(),
    configuration=video_mamba_configuration,
    model=video_mamba_model,
    moves=video_mamba_moves,
    prepare=inflate,
)
