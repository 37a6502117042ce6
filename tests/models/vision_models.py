"""Small vision backbones of every family, and images for them."""

from typing import Any

import torch
from torch import Tensor

from tests.helpers import DEVICE
from transmamba.models import VISION_PRESETS, VisionMambaClassifier, vision_model

SMALL: dict[str, dict[str, Any]] = {
    "plain_mamba": {"name": "plain_mamba_tiny", "num_stem_convs": 1, "layers_with_local_conv": [1]},
    "vim": {"name": "vim_tiny"},
    "vmamba": {"name": "vmamba_tiny", "depths": [1, 2], "hidden_sizes": [16, 24], "patch_size": 4},
    "video_mamba": {"name": "video_mamba_tiny"},
    "video_mamba of videos": {"name": "video_mamba_tiny", "num_frames": 4, "tubelet_size": 2},
}
COMMON: dict[str, Any] = {"image_size": 32, "num_labels": 5, "state_size": 4, "drop_path_rate": 0.0}
PLAIN: dict[str, Any] = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3}


def tiny_vision_model(family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> VisionMambaClassifier:
    """A model of the family with random weights, in evaluation mode."""
    torch.manual_seed(0)
    given = COMMON | ({} if family == "vmamba" else PLAIN) | SMALL[family] | fields
    name = given.pop("name")
    assert name in VISION_PRESETS
    return vision_model(name, **given).to(DEVICE, dtype).eval()


def images(
    family: str, batch: int = 2, height: int = 32, width: int = 32, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Random images, or videos of four frames."""
    generator = torch.Generator().manual_seed(1)
    frames = (4,) if "videos" in family else ()
    return torch.randn(batch, *frames, 3, height, width, generator=generator).to(DEVICE, dtype)
