"""A bidirectional Mamba-2 encoder of text: BERT's block with two state spaces in the attention's place."""

from .configuration import BiMamba2Config
from .modeling import BiMamba2Model, BiMamba2Output, BiMamba2PreTrainedModel

__all__ = ["BiMamba2Config", "BiMamba2Model", "BiMamba2Output", "BiMamba2PreTrainedModel"]
