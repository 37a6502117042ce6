"""Parameters and shapes: the parts that models are made of."""

from .bidirectional_mamba import BidirectionalMambaMixer
from .bidirectional_mamba2 import BidirectionalMamba2Mixer
from .cache import TransMambaCache, TransMambaLayerCache
from .conv import CausalConv1d
from .cross_scan import CrossScanMixer
from .decoding import StepPlace, hand_over, mixer_step, mlp_step, products
from .layout import TokenLayout
from .mixer import SSM_PARAMETERS, MixerConfig, RotaryTables, TransMambaMixer
from .mlp import GatedMLP, PlainMLP
from .patches import DropPath, PatchEmbedding
from .plain_mamba import PlainMambaMixer
from .scan_orders import DirectionOutput, ScanOrder, scan_order, scan_order_names
from .static_cache import LayerMode, StaticCache, StaticLayer, layer_mode

__all__ = [
    "SSM_PARAMETERS",
    "BidirectionalMamba2Mixer",
    "BidirectionalMambaMixer",
    "CausalConv1d",
    "CrossScanMixer",
    "DirectionOutput",
    "DropPath",
    "GatedMLP",
    "LayerMode",
    "MixerConfig",
    "PatchEmbedding",
    "PlainMLP",
    "PlainMambaMixer",
    "RotaryTables",
    "ScanOrder",
    "StaticCache",
    "StaticLayer",
    "StepPlace",
    "TokenLayout",
    "TransMambaCache",
    "TransMambaLayerCache",
    "TransMambaMixer",
    "hand_over",
    "layer_mode",
    "mixer_step",
    "mlp_step",
    "products",
    "scan_order",
    "scan_order_names",
]
