"""Using trained models: loading, writing text, warming up, measuring speed."""

from .checkpoint import load_checkpoint, load_language_model
from .decoding import StepTiming, measure_steps, warm_up
from .device import resolve_device
from .generation import Continuation, continue_prompt
from .speed import SpeedPoint, measure_speed
from .text_encoder import PACKAGED_ENCODERS, embed_texts, find_text_encoder, load_text_encoder

__all__ = [
    "PACKAGED_ENCODERS",
    "Continuation",
    "SpeedPoint",
    "StepTiming",
    "continue_prompt",
    "embed_texts",
    "find_text_encoder",
    "load_checkpoint",
    "load_language_model",
    "load_text_encoder",
    "measure_speed",
    "measure_steps",
    "resolve_device",
    "warm_up",
]
