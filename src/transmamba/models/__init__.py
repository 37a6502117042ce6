"""Whole models, Hugging Face style. Importing this room makes transformers' Auto classes know them."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
)

from .bimamba2 import BiMamba2Config, BiMamba2Model
from .plain_mamba import PlainMambaConfig, PlainMambaForImageClassification, PlainMambaModel
from .presets import VISION_PRESETS, vision_config, vision_model, vision_model_of
from .timm_models import register_with_timm
from .transmamba import TransMambaConfig, TransMambaForCausalLM, TransMambaModel
from .video_mamba import (
    VideoMambaConfig,
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaModel,
)
from .vim import VimConfig, VimForImageClassification, VimModel
from .vision import VisionMambaClassifier, split_tokens
from .vmamba import VMambaConfig, VMambaForImageClassification, VMambaModel

__all__ = [
    "VISION_PRESETS",
    "BiMamba2Config",
    "BiMamba2Model",
    "PlainMambaConfig",
    "PlainMambaForImageClassification",
    "PlainMambaModel",
    "TransMambaConfig",
    "TransMambaForCausalLM",
    "TransMambaModel",
    "VMambaConfig",
    "VMambaForImageClassification",
    "VMambaModel",
    "VideoMambaConfig",
    "VideoMambaForImageClassification",
    "VideoMambaForVideoClassification",
    "VideoMambaModel",
    "VimConfig",
    "VimForImageClassification",
    "VimModel",
    "VisionMambaClassifier",
    "register_with_timm",
    "split_tokens",
    "vision_config",
    "vision_model",
    "vision_model_of",
]

AutoConfig.register("bimamba2", BiMamba2Config, exist_ok=True)
AutoModel.register(BiMamba2Config, BiMamba2Model, exist_ok=True)
AutoConfig.register("transmamba", TransMambaConfig, exist_ok=True)
AutoModel.register(TransMambaConfig, TransMambaModel, exist_ok=True)
AutoModelForCausalLM.register(TransMambaConfig, TransMambaForCausalLM, exist_ok=True)

for _config, _model, _classifier in (
    (PlainMambaConfig, PlainMambaModel, PlainMambaForImageClassification),
    (VideoMambaConfig, VideoMambaModel, VideoMambaForImageClassification),
    (VimConfig, VimModel, VimForImageClassification),
    (VMambaConfig, VMambaModel, VMambaForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)

AutoModelForVideoClassification.register(VideoMambaConfig, VideoMambaForVideoClassification, exist_ok=True)
