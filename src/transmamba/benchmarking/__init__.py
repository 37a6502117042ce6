"""Speeds beside those of others and beside what the device allows; nothing is timed before it was found right."""

from .decode import DecodeOptions, DecodeResult, DecodeRow, measure_decoding, recorded_error
from .model import ModelOptions, ModelResult, ModelRow, measure_model
from .ops import OpRow, OpShape, OpsOptions, OpsResult, measure_ops
from .timing import Rates, Timing, measure_rates, provenance, time_call
from .tune import Trial, TuneOptions, TuneResult, tune_ops

__all__ = [
    "DecodeOptions",
    "DecodeResult",
    "DecodeRow",
    "ModelOptions",
    "ModelResult",
    "ModelRow",
    "OpRow",
    "OpShape",
    "OpsOptions",
    "OpsResult",
    "Rates",
    "Timing",
    "Trial",
    "TuneOptions",
    "TuneResult",
    "measure_decoding",
    "measure_model",
    "measure_ops",
    "measure_rates",
    "provenance",
    "recorded_error",
    "time_call",
    "tune_ops",
]
