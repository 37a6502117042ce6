"""The quickstart of images at toy size: everything is written, and twice the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification, DeiTForImageClassification

from transmamba.cli.main import main
from transmamba.errors import InputError, RecipeError
from transmamba.models import PlainMambaForImageClassification
from transmamba.recipes.vision_quickstart import SMOKE, STUDENTS, run_vision_quickstart
from transmamba.report import VisionQuickstartReport, html

TOY = replace(SMOKE, teacher_epochs=1, student_epochs=1, image_size=8, hidden_size=8)


@pytest.fixture(autouse=True)
def drawn_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_svg", lambda figure: b"<svg/>")


def scores(report: VisionQuickstartReport) -> list[tuple[float, float]]:
    return [(row.top_1, row.loss) for row in (report.teacher, *report.students)]


def test_every_step_is_written_and_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report = run_vision_quickstart(folder, size=TOY)
    assert {path.name for path in folder.iterdir()} - {".transmamba-vision-quickstart"} == {
        "report.html",
        "report.json",
        "teacher",
        *STUDENTS,
    }
    assert [row.name for row in report.students] == ["from scratch", "weights reused", "adapted"]
    assert report.students[0].from_teacher == 0 < report.students[1].from_teacher == report.students[2].from_teacher
    assert {row.num_parameters for row in report.students} == {report.students[0].num_parameters}
    assert (report.teacher.num_images, report.students[0].num_images, report.num_images) == (899, 40, 898)
    assert VisionQuickstartReport.from_json((folder / "report.json").read_text()) == report
    page = (folder / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert html._prose(report.headline()) in page
    teacher = AutoModelForImageClassification.from_pretrained(folder / "teacher" / "teacher")
    assert isinstance(teacher, DeiTForImageClassification)
    student = AutoModelForImageClassification.from_pretrained(folder / "adapt" / "model")
    assert isinstance(student, PlainMambaForImageClassification)
    written = json.loads((folder / "adapt" / "evaluation.json").read_text())
    assert written["student"]["top_1"] == report.students[-1].top_1
    assert written["teacher"]["top_1"] == report.teacher.top_1
    assert [list(row) for row in report.cka] == written["cka"]


def test_equal_seeds_give_equal_scores_and_others_do_not(tmp_path: Path) -> None:
    first, again, other = (
        scores(run_vision_quickstart(tmp_path / str(number), size=TOY, seed=seed))
        for number, seed in enumerate((3, 3, 4))
    )
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["quickstart", "--vision", "--smoke", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("Transformer", "from scratch", "weights reused", "adapted", "report.html"))
    assert main(["quickstart", "--vision", "--smoke", "--output", str(tmp_path)]) == 2  # holds something else
    with pytest.raises(RecipeError, match="not a quickstart"):
        run_vision_quickstart(tmp_path, size=TOY)


def test_a_report_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="not the JSON of a vision quickstart report"):
        VisionQuickstartReport.from_json("{}")
