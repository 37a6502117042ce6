"""PlainMamba (arXiv 2403.17695): a plain stack over patches that scans along snakes."""

from .configuration import PlainMambaConfig
from .modeling import PlainMambaForImageClassification, PlainMambaModel, PlainMambaPreTrainedModel

__all__ = ["PlainMambaConfig", "PlainMambaForImageClassification", "PlainMambaModel", "PlainMambaPreTrainedModel"]
