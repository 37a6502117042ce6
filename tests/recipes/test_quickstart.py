"""The quickstart at toy size: everything is written, and twice the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from transmamba.errors import RecipeError
from transmamba.models import TransMambaForCausalLM
from transmamba.recipes import quickstart
from transmamba.recipes.run_folder import claim_folder
from transmamba.report import QuickstartReport, StudentMeasurements

TOY = replace(
    quickstart.SMOKE,
    teacher_tokens=2048,
    student_tokens=5_120,
    seq_len=128,
    hidden_size=32,
    intermediate_size=32,
    eval_tokens=512,
    lengths=(32, 128),
    new_tokens=70,
)


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The quick brown fox jumps over the lazy dog, and the dog {} sleeps on. "
    documents = [text.format(number) * 12 for number in range(60)]
    monkeypatch.setattr(
        quickstart,
        "load_documents",
        lambda source: quickstart.Documents(train=documents[:50], validation=documents[50:]),
    )


def numbers(report: QuickstartReport) -> dict[str, object]:
    """Everything but what a clock says."""

    def untimed(measured: StudentMeasurements) -> StudentMeasurements:
        models = {name: replace(getattr(measured, name), speed=()) for name in ("teacher", "student")}
        return replace(measured, **models)

    measured = {name: untimed(getattr(report, name)) for name in ("converted", "untrained", "distilled")}
    curves = {name: [(row[0], row[2]) for row in getattr(report, name)] for name in ("training", "distillation")}
    return {**measured, **curves, "difference": report.difference, "samples": report.samples}


def test_equal_seeds_give_equal_numbers_and_others_do_not(tmp_path: Path) -> None:
    runs = [
        numbers(quickstart.run_quickstart(tmp_path / str(number), size=TOY, seed=seed))
        for number, seed in enumerate((3, 3, 4))
    ]
    assert runs[0] == runs[1]
    assert runs[1]["training"] != runs[2]["training"]
    assert runs[1]["distilled"] != runs[2]["distilled"]


def test_every_step_is_written_and_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report = quickstart.run_quickstart(folder, size=TOY)
    assert_measured(report)
    assert "http" not in (folder / "report.html").read_text().replace("http://www.w3.org", "")
    assert QuickstartReport.from_json((folder / "report.json").read_text()) == report
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder / "teacher" / "model"), LlamaForCausalLM)
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder / "student" / "model"), TransMambaForCausalLM)
    table = json.loads((folder / "converted" / "conversion.json").read_text())
    assert table["max_relative_logit_difference"] == report.difference
    assert set(json.loads((folder / "student" / "run.json").read_text())["stages"]) == {"mixers", "logits"}


def test_an_earlier_quickstart_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    claim_folder(folder, quickstart.MARKER)
    (folder / "old").touch()
    claim_folder(folder, quickstart.MARKER)
    assert not (folder / "old").exists()

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").touch()
    with pytest.raises(RecipeError, match="not a quickstart"):
        claim_folder(other, quickstart.MARKER)
    assert (other / "chapter.txt").exists()


def assert_measured(report: QuickstartReport) -> None:
    assert report.difference < 1e-5
    same, moved, learnt = report.converted.own, report.untrained.own, report.distilled.own
    assert set(same.trans_points) == {None}
    # fp32, where two forms of one function differ by 1e-6.
    assert abs(same.loss_difference) < 1e-4
    assert (same.top1, len(report.distilled.schedules)) == (1, TOY.schedules)
    attention = report.distilled.schedules[-1]  # which the distillation leaves alone
    assert set(attention.trans_points) == {None}
    assert abs(attention.loss_difference) < 1e-4
    assert moved.trans_points == learnt.trans_points == [0, 2, 4, 8, 16, 32, 64, None]
    assert moved.kl > 1e-6
    assert learnt.nats_per_token < moved.nats_per_token
    assert report.training[-1][0] == TOY.teacher_tokens
    assert report.training[-1][2] < report.training[0][2]
    assert report.distillation[-1][0] == TOY.student_tokens
    assert [row.length for row in report.distilled.student.speed] == [32, 128]
    assert [row.length for row in report.converted.student.speed] == [128]

    positions = [position for position, _ in report.samples[0].pieces]
    assert [point for point in learnt.trans_points if point and positions[0] < point <= positions[-1]]
