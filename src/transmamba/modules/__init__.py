"""Parameters and shapes: the parts that models are made of."""

from .bidirectional_mamba import BidirectionalMambaMixer
from .bidirectional_mamba2 import BidirectionalMamba2Mixer
from .cache import TransMambaCache, TransMambaLayerCache
from .conv import CausalConv1d
from .cross_scan import CrossScanMixer
from .layout import TokenLayout
from .mixer import SSM_PARAMETERS, MixerConfig, RotaryTables, TransMambaMixer
from .mlp import GatedMLP, PlainMLP
from .patches import DropPath, PatchEmbedding
from .plain_mamba import PlainMambaMixer
from .scan_orders import DirectionOutput, ScanOrder, scan_order, scan_order_names

__all__ = [
    "SSM_PARAMETERS",
    "BidirectionalMamba2Mixer",
    "BidirectionalMambaMixer",
    "CausalConv1d",
    "CrossScanMixer",
    "DirectionOutput",
    "DropPath",
    "GatedMLP",
    "MixerConfig",
    "PatchEmbedding",
    "PlainMLP",
    "PlainMambaMixer",
    "RotaryTables",
    "ScanOrder",
    "TokenLayout",
    "TransMambaCache",
    "TransMambaLayerCache",
    "TransMambaMixer",
    "scan_order",
    "scan_order_names",
]
