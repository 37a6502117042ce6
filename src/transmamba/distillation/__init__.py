"""Distillation: losses, what is tapped of student and teacher, where the TransPoints are, teachers that were stored.

And for students of images and text: directions, layer weights and projections of the adaption, and what it is
compared with.
"""

from .adaption import AdaptionLoss, AdaptionObjective, feature_loss, make_projections, student_features
from .alignment import matrix_errors, output_errors
from .curriculum import TransPointCurriculum
from .directions import direction_cosine, target_layer, teacher_in_order
from .image_baselines import (
    BridgingObjective,
    FinalFeatureObjective,
    MixingObjective,
    SoftLogitObjective,
    TaskObjective,
    make_bridges,
)
from .layer_weights import LAYER_WEIGHTS, layer_weights
from .losses import DenseTarget, GivenTarget, LogitTarget, TopKTarget, logit_loss
from .objectives import AlignmentObjective, LogitObjective
from .offline import StoredTeacher, StoredTeacherInfo, TaughtWindows, store_teacher
from .projections import LatentProjections, attached
from .sentence_adaption import SentenceAdaptionObjective, SentenceLoss, SentenceProjections
from .signals import MixerSignal, mixer_signals, teacher_forced
from .teacher import OnlineTeacher, Teacher
from .text_teacher import TextSignals, TextTeacher
from .vision_teacher import TeacherSignals, VisionTeacher

__all__ = [
    "LAYER_WEIGHTS",
    "AdaptionLoss",
    "AdaptionObjective",
    "AlignmentObjective",
    "BridgingObjective",
    "DenseTarget",
    "FinalFeatureObjective",
    "GivenTarget",
    "LatentProjections",
    "LogitObjective",
    "LogitTarget",
    "MixerSignal",
    "MixingObjective",
    "OnlineTeacher",
    "SentenceAdaptionObjective",
    "SentenceLoss",
    "SentenceProjections",
    "SoftLogitObjective",
    "StoredTeacher",
    "StoredTeacherInfo",
    "TaskObjective",
    "TaughtWindows",
    "Teacher",
    "TeacherSignals",
    "TextSignals",
    "TextTeacher",
    "TopKTarget",
    "TransPointCurriculum",
    "VisionTeacher",
    "attached",
    "direction_cosine",
    "feature_loss",
    "layer_weights",
    "logit_loss",
    "make_bridges",
    "make_projections",
    "matrix_errors",
    "mixer_signals",
    "output_errors",
    "store_teacher",
    "student_features",
    "target_layer",
    "teacher_forced",
    "teacher_in_order",
]
