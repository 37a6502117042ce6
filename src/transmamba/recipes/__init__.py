"""Recipes: Python functions that return a whole run, and what carries runs out.

A recipe of your own is a function in any file: `transmamba train my_recipes.py:my_run`.
"""

from transmamba.recipes.carry_out import TrainedModel, train_language_model, validation_source
from transmamba.recipes.fields import field_types, with_fields
from transmamba.recipes.language_model import LanguageModelRun, ModelSettings
from transmamba.recipes.sizes import count_parameters, match_parameters
from transmamba.recipes.student_report import ReportSettings, measure_student, report_student
from transmamba.recipes.table import RECIPES, find_recipe

__all__ = [
    "RECIPES",
    "LanguageModelRun",
    "ModelSettings",
    "ReportSettings",
    "TrainedModel",
    "count_parameters",
    "field_types",
    "find_recipe",
    "match_parameters",
    "measure_student",
    "report_student",
    "train_language_model",
    "validation_source",
    "with_fields",
]
