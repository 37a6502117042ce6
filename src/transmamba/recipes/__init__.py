"""Recipes: Python functions that return a whole run, and what carries runs out.

A recipe of your own is a function in any file: `transmamba train my_recipes.py:my_run`.
"""

from transmamba.recipes.carry_out import TrainedModel, train_language_model, validation_source
from transmamba.recipes.distil import DistilledModel, distil
from transmamba.recipes.distillation import AlignmentStage, DistillationRun, LogitStage
from transmamba.recipes.fields import field_types, with_fields
from transmamba.recipes.language_model import LanguageModelRun, ModelSettings
from transmamba.recipes.recording import RecordingRun, record_teacher
from transmamba.recipes.sizes import count_parameters, match_parameters
from transmamba.recipes.student_report import ReportSettings, measure_student, report_student
from transmamba.recipes.table import DISTILLATIONS, RECIPES, find_distillation, find_recipe
from transmamba.recipes.training_run import TrainingRun

__all__ = [
    "DISTILLATIONS",
    "RECIPES",
    "AlignmentStage",
    "DistillationRun",
    "DistilledModel",
    "LanguageModelRun",
    "LogitStage",
    "ModelSettings",
    "RecordingRun",
    "ReportSettings",
    "TrainedModel",
    "TrainingRun",
    "count_parameters",
    "distil",
    "field_types",
    "find_distillation",
    "find_recipe",
    "match_parameters",
    "measure_student",
    "record_teacher",
    "report_student",
    "train_language_model",
    "validation_source",
    "with_fields",
]
