"""Parameters and shapes: the parts that models are made of."""

from .cache import TransMambaCache, TransMambaLayerCache
from .conv import CausalConv1d
from .layout import TokenLayout
from .mixer import SSM_PARAMETERS, MixerConfig, RotaryTables, TransMambaMixer
from .mlp import GatedMLP, PlainMLP

__all__ = [
    "SSM_PARAMETERS",
    "CausalConv1d",
    "GatedMLP",
    "MixerConfig",
    "PlainMLP",
    "RotaryTables",
    "TokenLayout",
    "TransMambaCache",
    "TransMambaLayerCache",
    "TransMambaMixer",
]
