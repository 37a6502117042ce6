"""Using trained models: loading, writing text, measuring speed."""

from .checkpoint import load_checkpoint, load_teacher
from .device import resolve_device
from .generation import Continuation, continue_prompt
from .speed import SpeedPoint, measure_speed

__all__ = [
    "Continuation",
    "SpeedPoint",
    "continue_prompt",
    "load_checkpoint",
    "load_teacher",
    "measure_speed",
    "resolve_device",
]
