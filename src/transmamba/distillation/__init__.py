"""Distillation: losses, what is tapped of student and teacher, where the TransPoints are, teachers that were stored."""

from .alignment import matrix_errors, output_errors
from .curriculum import TransPointCurriculum
from .losses import DenseTarget, GivenTarget, LogitTarget, TopKTarget, logit_loss
from .objectives import AlignmentObjective, LogitObjective
from .offline import StoredTeacher, StoredTeacherInfo, TaughtWindows, store_teacher
from .signals import MixerSignal, mixer_signals, teacher_forced
from .teacher import OnlineTeacher, Teacher

__all__ = [
    "AlignmentObjective",
    "DenseTarget",
    "GivenTarget",
    "LogitObjective",
    "LogitTarget",
    "MixerSignal",
    "OnlineTeacher",
    "StoredTeacher",
    "StoredTeacherInfo",
    "TaughtWindows",
    "Teacher",
    "TopKTarget",
    "TransPointCurriculum",
    "logit_loss",
    "matrix_errors",
    "mixer_signals",
    "output_errors",
    "store_teacher",
    "teacher_forced",
]
