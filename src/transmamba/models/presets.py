"""The vision backbones by name: the published sizes, and the 12-layer PlainMambas of arXiv 2502.15130."""

from collections.abc import Callable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from transmamba.errors import InputError

from .plain_mamba import PlainMambaConfig, PlainMambaForImageClassification
from .video_mamba import VideoMambaConfig, VideoMambaForImageClassification, VideoMambaForVideoClassification
from .vim import VimConfig, VimForImageClassification
from .vision import VisionMambaClassifier
from .vmamba import VMambaConfig, VMambaForImageClassification

# Name: configuration and the fields that are not its defaults. Drop path rates are those of the published training.
VISION_PRESETS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    # Students with a Transformer's width and depth: that of DeiT-tiny, -small and -base.
    "plain_mamba_tiny": (PlainMambaConfig, {"hidden_size": 192}),
    "plain_mamba_small": (PlainMambaConfig, {"hidden_size": 384}),
    "plain_mamba_base": (PlainMambaConfig, {"hidden_size": 768}),
    "plain_mamba_l1": (
        PlainMambaConfig,
        {
            "hidden_size": 192,
            "num_hidden_layers": 24,
            "num_stem_convs": 1,
            "layers_with_local_conv": (0,),
            "drop_path_rate": 0.2,
        },
    ),
    "plain_mamba_l2": (PlainMambaConfig, {"hidden_size": 384, "num_hidden_layers": 24, "drop_path_rate": 0.2}),
    "plain_mamba_l3": (PlainMambaConfig, {"hidden_size": 448, "num_hidden_layers": 36, "drop_path_rate": 0.4}),
    "vim_tiny": (VimConfig, {"hidden_size": 192}),
    "vim_small": (VimConfig, {"hidden_size": 384}),
    "vim_base": (VimConfig, {"hidden_size": 768}),
    "vmamba_tiny": (VMambaConfig, {"drop_path_rate": 0.2}),
    "vmamba_small": (VMambaConfig, {"depths": (2, 2, 15, 2), "expand": 2.0, "drop_path_rate": 0.3}),
    "vmamba_base": (
        VMambaConfig,
        {
            "depths": (2, 2, 15, 2),
            "hidden_sizes": (128, 256, 512, 1024),
            "expand": 2.0,
            "drop_path_rate": 0.6,
        },
    ),
    "video_mamba_tiny": (VideoMambaConfig, {"hidden_size": 192}),
    "video_mamba_small": (VideoMambaConfig, {"hidden_size": 384}),
    "video_mamba_middle": (VideoMambaConfig, {"hidden_size": 576, "num_hidden_layers": 32}),
}


def vision_config(name: str, **fields: Any) -> PreTrainedConfig:
    """The configuration of this name; fields replace its own, such as image_size, patch_size, num_labels.

    Raises:
        InputError: there is none of this name.
    """
    if name not in VISION_PRESETS:
        raise InputError(f"there is no vision model {name!r}; choose one of {', '.join(VISION_PRESETS)}.")
    kind, chosen = VISION_PRESETS[name]
    return kind(**(chosen | fields))


def vision_model(name: str, **fields: Any) -> VisionMambaClassifier:
    """A classifier of this name with initial values; see vision_config. VideoMambas with num_frames are of videos."""
    return vision_model_of(vision_config(name, **fields))


def vision_model_of(config: PreTrainedConfig) -> VisionMambaClassifier:
    """A classifier of this configuration with initial values."""
    if isinstance(config, VideoMambaConfig) and config.num_frames is not None:
        return VideoMambaForVideoClassification(config)
    return _CLASSIFIERS[config.model_type](config)


_CLASSIFIERS: dict[str, Callable[[Any], VisionMambaClassifier]] = {
    "plain_mamba": PlainMambaForImageClassification,
    "video_mamba": VideoMambaForImageClassification,
    "vim": VimForImageClassification,
    "vmamba": VMambaForImageClassification,
}
