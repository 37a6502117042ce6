"""Mathematics with a contract: each op is a folder with a public function, its reference and its fast forms."""

from .attention_step import attention_step
from .backends import BackendChoice, explain
from .bidirectional_scan import bidirectional_scan
from .causal_conv1d import causal_conv1d
from .checks import check_values
from .conv_ssd_step import conv_ssd_step
from .gated_rms_norm import gated_rms_norm
from .hybrid_mixer import hybrid_mixer
from .logit_distillation import LogitLosses, logit_distillation
from .memory_converter import memory_converter
from .merge_scans import begin_scans, merge_scans
from .residual_norm import post_norm, residual_norm
from .rotary import apply_rotary
from .selective_scan import selective_scan
from .softmax_attention import softmax_attention
from .ssd_scan import ssd_scan
from .ssd_step import ssd_step
from .step_linear import step_linear
from .token_cosines import token_cosines

__all__ = [
    "BackendChoice",
    "LogitLosses",
    "apply_rotary",
    "attention_step",
    "begin_scans",
    "bidirectional_scan",
    "causal_conv1d",
    "check_values",
    "conv_ssd_step",
    "explain",
    "gated_rms_norm",
    "hybrid_mixer",
    "logit_distillation",
    "memory_converter",
    "merge_scans",
    "post_norm",
    "residual_norm",
    "selective_scan",
    "softmax_attention",
    "ssd_scan",
    "ssd_step",
    "step_linear",
    "token_cosines",
]
