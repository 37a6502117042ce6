"""Using trained models: loading, writing text, warming up, measuring speed."""

from .checkpoint import load_checkpoint, load_language_model
from .decoding import StepTiming, measure_steps, warm_up
from .device import resolve_device
from .generation import Continuation, continue_prompt
from .speed import SpeedPoint, measure_speed

__all__ = [
    "Continuation",
    "SpeedPoint",
    "StepTiming",
    "continue_prompt",
    "load_checkpoint",
    "load_language_model",
    "measure_speed",
    "measure_steps",
    "resolve_device",
    "warm_up",
]
