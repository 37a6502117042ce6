"""Made-up measurements from which the tests build reports."""

from dataclasses import replace

from transmamba.report import CrossedSample, ModelRun, QuickstartReport
from transmamba.schedule import TransPointSchedule

LENGTHS = (64, 256, 1024)
SCHEDULES = {
    "Transformer": [None] * 4,
    "Mamba-2": [0] * 4,
    "hybrid": [0, None, 0, None],
    "V9": [0, 4, 64, None],
}


def make_run(name: str, *, bits_per_byte: float = 2.0, cache: int = 1000, decode: float = 50.0) -> ModelRun:
    return ModelRun(
        name=name,
        trans_points=TransPointSchedule(SCHEDULES.get(name, [1, 2, 3, 4])),
        mixer_form="shared" if name == "V9" else "standard",
        num_parameters=1_234_567,
        training_curve=((100, 0.5, 5.5), (1000, 5.0, 2.5), (2000, 61.0, 2.25)),
        bits_per_byte=bits_per_byte,
        nats_per_token=1.5,
        loss_by_position=((1.0, 3.0), (8.0, 2.5), (64.0, 2.0)),
        prefill=tuple((length, 100.0 * length) for length in LENGTHS),
        decode=tuple((length, decode) for length in LENGTHS),
        cache=tuple((length, cache * length) for length in LENGTHS),
    )


def make_report(*runs: ModelRun, **changes: object) -> QuickstartReport:
    runs = runs or tuple(make_run(name) for name in SCHEDULES)
    report = QuickstartReport(
        subject=runs[-1].name,
        runs=runs,
        samples=(
            CrossedSample(model=runs[-1].name, prompt="Return the", pieces=((3, " first"), (4, " item"), (64, "."))),
        ),
        seq_len=256,
        corpus="a corpus of 2 MB",
        tokenizer="bytes",
        versions={"python": "3.11.7", "torch": "2.13.0"},
        seed=17,
        command="transmamba quickstart --output runs/quickstart",
        date="2026-01-01",
        seconds=301.0,
    )
    return replace(report, **changes)
