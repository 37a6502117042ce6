"""VideoMamba (arXiv 2403.06977): bidirectional scans over the patches of images or of all frames of a video."""

from .configuration import VideoMambaConfig
from .modeling import (
    VideoMambaForImageClassification,
    VideoMambaForVideoClassification,
    VideoMambaModel,
    VideoMambaPreTrainedModel,
)

__all__ = [
    "VideoMambaConfig",
    "VideoMambaForImageClassification",
    "VideoMambaForVideoClassification",
    "VideoMambaModel",
    "VideoMambaPreTrainedModel",
]
