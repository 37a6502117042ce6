"""A pretrained Transformer becomes a TransMamba whose logits are the same while every TransPoint is None."""

from .folder import ConvertedFolder, convert_checkpoint
from .initialisation import INITIALISATIONS, Initialisation, calibrate
from .plan import ConversionPlan, CopiedParameter, FreshParameter, IgnoredTensor
from .published import PUBLISHED_FAMILIES, load_published
from .sources import FAMILIES, Family
from .student import convert, plan_conversion
from .verification import LARGEST_DIFFERENCE, relative_logit_difference

__all__ = [
    "FAMILIES",
    "INITIALISATIONS",
    "LARGEST_DIFFERENCE",
    "PUBLISHED_FAMILIES",
    "ConversionPlan",
    "ConvertedFolder",
    "CopiedParameter",
    "Family",
    "FreshParameter",
    "IgnoredTensor",
    "Initialisation",
    "calibrate",
    "convert",
    "convert_checkpoint",
    "load_published",
    "plan_conversion",
    "relative_logit_difference",
]
