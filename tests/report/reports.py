"""Made-up measurements from which the tests build reports of a quickstart."""

from dataclasses import replace
from math import log

from tests.report.student_reports import OWN, make_measurements
from transmamba.report import CrossedSample, QuickstartReport, StudentMeasurements
from transmamba.schedule import TransPointSchedule

NONE = TransPointSchedule([None] * len(OWN))


def at_ratio(ratio: float, *, own: TransPointSchedule = OWN, top1: float = 0.7) -> StudentMeasurements:
    """A student whose perplexity is so many times its teacher's."""
    return make_measurements(difference=log(ratio), own=own, top1=top1, others=() if own == NONE else (0.05, 0.0))


def make_report(**changes: object) -> QuickstartReport:
    report = QuickstartReport(
        schedule="V9",
        converted=at_ratio(1.0, own=NONE, top1=1.0),
        untrained=at_ratio(1.5, top1=0.4),
        distilled=at_ratio(1.125, top1=0.8),
        difference=2.5e-7,
        training=((100, 0.5, 5.5), (1000, 5.0, 2.5), (2000, 61.0, 2.25)),
        distillation=((100, 1.5, 0.5), (500, 30.0, 0.125)),
        samples=(CrossedSample(prompt="Return the", pieces=((3, " first"), (4, " item"), (64, "."))),),
        corpus="a corpus of 2 MB",
        settings={"tokenizer": "bytes"},
        versions={"python": "3.11.7", "torch": "2.13.0"},
        seed=17,
        command="transmamba quickstart --output runs/quickstart",
        date="2026-01-01",
        seconds=301.0,
    )
    return replace(report, **changes)
