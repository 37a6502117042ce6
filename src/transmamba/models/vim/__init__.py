"""Vision Mamba (arXiv 2401.09417): bidirectional scans over patches with a class token in their middle."""

from .configuration import VimConfig
from .modeling import VimForImageClassification, VimModel, VimPreTrainedModel

__all__ = ["VimConfig", "VimForImageClassification", "VimModel", "VimPreTrainedModel"]
