"""What a run looks like to people: figures, and pages that are one file each."""

from transmamba.report.adaption import AdaptionReport, alignment_figure, confusion_figure, layers_over_time
from transmamba.report.figures import (
    cache_figure,
    loss_by_position,
    loss_curves,
    model_colours,
    position_figure,
    quality_by_schedule,
    recall_figure,
    schedule_figure,
    throughput_figure,
)
from transmamba.report.html import Mark, Page
from transmamba.report.quickstart import CrossedSample, QuickstartReport
from transmamba.report.sentences import SentenceReport
from transmamba.report.student import (
    AgreementRow,
    Findings,
    MeasuredModel,
    MeasuredSchedule,
    RecallRow,
    SpeedRow,
    StudentMeasurements,
    StudentReport,
)
from transmamba.report.units import format_bytes, format_count, format_seconds
from transmamba.report.vision_quickstart import ClassifierRow, VisionQuickstartReport

__all__ = [
    "AdaptionReport",
    "AgreementRow",
    "ClassifierRow",
    "CrossedSample",
    "Findings",
    "Mark",
    "MeasuredModel",
    "MeasuredSchedule",
    "Page",
    "QuickstartReport",
    "RecallRow",
    "SentenceReport",
    "SpeedRow",
    "StudentMeasurements",
    "StudentReport",
    "VisionQuickstartReport",
    "alignment_figure",
    "cache_figure",
    "confusion_figure",
    "format_bytes",
    "format_count",
    "format_seconds",
    "layers_over_time",
    "loss_by_position",
    "loss_curves",
    "model_colours",
    "position_figure",
    "quality_by_schedule",
    "recall_figure",
    "schedule_figure",
    "throughput_figure",
]
