"""Made-up measurements of a student and its teacher."""

from dataclasses import replace
from math import log

from transmamba.report import (
    AgreementRow,
    MeasuredModel,
    MeasuredSchedule,
    RecallRow,
    SpeedRow,
    StudentMeasurements,
    StudentReport,
)
from transmamba.schedule import TransPointSchedule

LENGTHS = (128, 512)
OWN = TransPointSchedule([0, 4, 64, 256])


def recall_row(task: str, length: int, chosen: float, depth: float | None = None, count: int = 100) -> RecallRow:
    return RecallRow(
        task=task,
        length=length,
        depth=depth,
        count=count,
        exact=chosen / 2,
        chosen=chosen,
        loss=3.0 - chosen,
        chance=0.125,
    )


def make_model(
    *,
    nats: float = 3.0,
    trans_points: TransPointSchedule | None = None,
    needle: float = 0.9,
    book: float = 0.6,
    cache: int = 1000,
    grows: bool = True,
    speed: float = 100.0,
) -> MeasuredModel:
    chosen = {"needle": needle, "phone-book": book}
    return MeasuredModel(
        kind="llama" if trans_points is None else "transmamba",
        trans_points=trans_points,
        num_parameters=1_000_000 if trans_points is None else 1_060_000,
        nats_per_token=nats,
        bits_per_byte=nats / 3,
        loss_by_position=((1.0, nats + 1), (8.0, nats), (64.0, nats - 0.5)),
        recall=tuple(recall_row(task, length, share) for task, share in chosen.items() for length in LENGTHS),
        recall_by_depth=tuple(
            recall_row(task, length, share, depth, 50)
            for task, share in chosen.items()
            for length in LENGTHS
            for depth in (0.0, 1.0)
        ),
        speed=tuple(
            SpeedRow(
                length=length,
                prefill_tokens_per_second=10 * speed,
                decode_tokens_per_second=speed,
                cache_bytes=cache * (length if grows else 128),
                peak_bytes=None,
            )
            for length in LENGTHS
        ),
    )


def make_schedule(
    trans_points: TransPointSchedule,
    difference: float,
    *,
    teacher: float = 3.0,
    error: float = 0.004,
    top1: float = 0.7,
) -> MeasuredSchedule:
    return MeasuredSchedule(
        trans_points=trans_points,
        attention_share=trans_points.attention_share(512),
        nats_per_token=3.0 + difference,
        bits_per_byte=(3.0 + difference) / 3,
        loss_difference=difference,
        standard_error=error,
        kl=max(difference, 0.0),
        top1=top1,
    )


def make_measurements(
    *,
    difference: float = log(1.2),
    error: float = 0.004,
    top1: float = 0.7,
    own: TransPointSchedule = OWN,
    others: tuple[float, ...] = (0.05, 0.0),
    teacher: MeasuredModel | None = None,
    **student: object,
) -> StudentMeasurements:
    none = TransPointSchedule([None] * len(own))
    steps = own.between(none, len(others) + 1, 512)[1:] if others else []
    return StudentMeasurements(
        seq_len=512,
        num_tokens=20_000,
        teacher=teacher or make_model(),
        student=make_model(
            **{"nats": 3.0 + difference, "trans_points": own, "cache": 500, "grows": None in own, **student}
        ),
        schedules=(
            make_schedule(own, difference, error=error, top1=top1),
            *(make_schedule(step, other, error=error) for step, other in zip(steps, others, strict=True)),
        ),
        agreement=(
            AgreementRow(start=0, end=1, kl=0.1, top1=0.9, num_tokens=100),
            AgreementRow(start=1, end=8, kl=0.3, top1=0.7, num_tokens=700),
        ),
    )


def make_student_report(measured: StudentMeasurements | None = None, **changes: object) -> StudentReport:
    report = StudentReport(
        student="my-student",
        teacher="my-teacher",
        text="my-text.txt",
        measured=measured or make_measurements(),
        settings={"seq_len": "512"},
        versions={"python": "3.11.7"},
        device="cpu",
        command="transmamba report my-student --against my-teacher",
        date="2026-01-01",
        seconds=61.0,
    )
    return replace(report, **changes)
