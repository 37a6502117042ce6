"""VMamba (arXiv 2401.10166): a pyramid whose blocks scan rows and columns both ways."""

from .configuration import VMambaConfig
from .modeling import VMambaForImageClassification, VMambaModel, VMambaPreTrainedModel

__all__ = ["VMambaConfig", "VMambaForImageClassification", "VMambaModel", "VMambaPreTrainedModel"]
