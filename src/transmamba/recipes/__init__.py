"""Recipes: Python functions that return a whole run, and what carries runs out.

A recipe of your own is a function in any file: `transmamba train my_recipes.py:my_run`.
"""

from transmamba.recipes.adapt_images import AdaptedModel, adapt_images, plan_adaptation, train_image_teacher
from transmamba.recipes.adapt_sentences import AdaptedEncoder, adapt_sentence_encoder, plan_sentence_adaptation
from transmamba.recipes.adaptation import METHODS, AdaptationRun, SubcloningSettings, TeacherTraining
from transmamba.recipes.carry_out import TrainedModel, train_language_model, validation_source
from transmamba.recipes.distil import DistilledModel, distil
from transmamba.recipes.distillation import AlignmentStage, DistillationRun, LogitStage
from transmamba.recipes.fields import field_types, with_fields
from transmamba.recipes.language_model import LanguageModelRun, ModelSettings
from transmamba.recipes.recording import RecordingRun, record_teacher
from transmamba.recipes.sentence_adaptation import EncoderSettings, EncoderSubcloning, SentenceAdaptationRun
from transmamba.recipes.sizes import count_parameters, match_parameters
from transmamba.recipes.student_report import ReportSettings, measure_student, report_student
from transmamba.recipes.table import (
    ADAPTATIONS,
    DISTILLATIONS,
    RECIPES,
    SENTENCE_ADAPTATIONS,
    find_adaptation,
    find_distillation,
    find_recipe,
    find_sentence_adaptation,
)
from transmamba.recipes.training_run import TrainingRun

__all__ = [
    "ADAPTATIONS",
    "DISTILLATIONS",
    "METHODS",
    "RECIPES",
    "SENTENCE_ADAPTATIONS",
    "AdaptationRun",
    "AdaptedEncoder",
    "AdaptedModel",
    "AlignmentStage",
    "DistillationRun",
    "DistilledModel",
    "EncoderSettings",
    "EncoderSubcloning",
    "LanguageModelRun",
    "LogitStage",
    "ModelSettings",
    "RecordingRun",
    "ReportSettings",
    "SentenceAdaptationRun",
    "SubcloningSettings",
    "TeacherTraining",
    "TrainedModel",
    "TrainingRun",
    "adapt_images",
    "adapt_sentence_encoder",
    "count_parameters",
    "distil",
    "field_types",
    "find_adaptation",
    "find_distillation",
    "find_recipe",
    "find_sentence_adaptation",
    "match_parameters",
    "measure_student",
    "plan_adaptation",
    "plan_sentence_adaptation",
    "record_teacher",
    "report_student",
    "train_image_teacher",
    "train_language_model",
    "validation_source",
    "with_fields",
]
