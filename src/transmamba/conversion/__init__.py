"""A pretrained Transformer becomes a TransMamba whose logits are the same while every TransPoint is None, or a Mamba of
another width and depth that begins with parts of its weights (subcloning)."""

from .folder import ConvertedFolder, convert_checkpoint
from .initialisation import INITIALISATIONS, Initialisation, calibrate
from .plan import ConversionPlan, CopiedParameter, FreshParameter, IgnoredTensor
from .published import PUBLISHED_FAMILIES, load_published
from .sources import FAMILIES, Family
from .student import convert, plan_conversion
from .subcloning import RANKINGS, FreshPart, SubclonedPart, SubcloningPlan, plan_subcloning, subclone
from .verification import LARGEST_DIFFERENCE, relative_logit_difference

__all__ = [
    "FAMILIES",
    "INITIALISATIONS",
    "LARGEST_DIFFERENCE",
    "PUBLISHED_FAMILIES",
    "RANKINGS",
    "ConversionPlan",
    "ConvertedFolder",
    "CopiedParameter",
    "Family",
    "FreshParameter",
    "FreshPart",
    "IgnoredTensor",
    "Initialisation",
    "SubclonedPart",
    "SubcloningPlan",
    "calibrate",
    "convert",
    "convert_checkpoint",
    "load_published",
    "plan_conversion",
    "plan_subcloning",
    "relative_logit_difference",
    "subclone",
]
