"""The report says what the numbers say, for any numbers, and survives being written and read."""

import io
import json
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path

import pytest
from rich.console import Console

from tests.report.reports import NONE, at_ratio, make_report
from tests.report.student_reports import OWN, make_measurements, make_model
from transmamba.errors import InputError
from transmamba.report import CrossedSample, Mark, Page, QuickstartReport
from transmamba.schedule import TransPointSchedule


class TestSteps:
    def test_each_step_has_its_numbers(self) -> None:
        assert make_report().steps() == [
            "The teacher, a Transformer (llama, 1 M parameters), read 2 k tokens in 1 min 1 s: 1.000 bits per byte of "
            "unseen text.",
            "The student is that model converted to a TransMamba. While no layer switches, its logits differ from the "
            "teacher's by at most 2.5e-07 of the largest, and 100 % of its next tokens are the same.",
            "Switched to V9 with nothing trained, its perplexity is 1.500 times the teacher's, and 40 % of its next "
            "tokens are the same.",
            "Distilled, it read 500 tokens in 30 s: its perplexity is 1.125 times the teacher's, and 80 % of its next "
            "tokens are the same.",
        ]

    def test_a_distillation_that_did_harm_is_said(self) -> None:
        _, _, before, after = make_report(distilled=at_ratio(20.0)).steps()
        assert "1.500 times" in before
        assert "20.00 times" in after

    def test_a_student_better_than_its_teacher_is_said(self) -> None:
        assert "0.900 times" in make_report(distilled=at_ratio(0.9)).steps()[-1]

    def test_what_is_not_finite_is_said(self) -> None:
        report = make_report(distilled=make_measurements(difference=nan), distillation=())
        assert "Distilled, it was not trained: its perplexity is not finite" in report.steps()[-1]
        assert "perplexity is not finite" in report.page().render()


class TestTable:
    def test_there_is_a_row_for_every_model_the_student_becomes(self) -> None:
        headers, rows = make_report().summary()
        assert headers == [
            "model",
            "bits per byte",
            "perplexity",
            "same next token",
            "KL",
            "tokens/s at 512",
            "cache at 512",
        ]
        assert rows == [
            ["Transformer", "1.000", "20.09", "", "", "100", "512 kB"],
            ["converted", "1.000", "20.09", "100 %", "0.000", "100", "256 kB"],
            ["switched to V9", "1.135", "30.13", "40 %", "0.405", "100", "64 kB"],
            ["distilled to V9", "1.039", "22.60", "80 %", "0.118", "100", "64 kB"],
        ]

    def test_only_lengths_that_both_were_timed_at_count(self) -> None:
        short = make_model()
        short = replace(short, speed=short.speed[:1])
        headers, rows = make_report(distilled=make_measurements(teacher=short)).summary()
        assert headers[-1] == "cache at 128"
        assert rows[0][-1] == "128 kB"

    def test_without_speed_its_cells_are_empty(self) -> None:
        measured = {
            name: make_measurements(teacher=replace(make_model(), speed=()), own=own, others=())
            for name, own in (("converted", NONE), ("untrained", OWN), ("distilled", OWN))
        }
        headers, rows = make_report(**measured).summary()
        assert headers[-2:] == ["tokens/s", "cache"]
        assert {tuple(row[-2:]) for row in rows} == {("", "")}

    def test_rounding_below_zero_is_zero(self) -> None:
        measured = at_ratio(1.0, own=NONE)
        same = replace(measured, schedules=(replace(measured.own, kl=-2e-10),))
        assert make_report(converted=same).summary()[1][1][4] == "0.000"

    def test_it_is_printed_with_the_findings(self) -> None:
        stream = io.StringIO()
        report = make_report()
        report.print_table(Console(file=stream, width=200))
        printed = stream.getvalue()
        for row in report.summary()[1]:
            assert f"\n{row[0]} " in printed
        findings = report.distilled.findings()
        for sentence in (findings.headline, *report.steps(), *findings.costs):
            assert sentence in printed
        assert printed.index("Steps") < printed.index("It costs")


class TestSample:
    SCHEDULE = TransPointSchedule([0, 2, 4, 6, 6, None])

    def test_marks_stand_before_the_token_that_switches(self) -> None:
        sample = CrossedSample(prompt="p", pieces=((3, "a"), (4, "b"), (6, "c")))
        assert sample.marked(self.SCHEDULE) == [
            "a",
            Mark("token 4: 3 of 6 layers are SSM now"),
            "b",
            Mark("token 6: 5 of 6 layers are SSM now"),
            "c",
        ]
        assert sample.crossed_in_prompt(self.SCHEDULE) == [2]

    def test_a_switch_at_the_first_written_token_is_marked(self) -> None:
        sample = CrossedSample(prompt="p", pieces=((4, "b"), (5, "c")))
        assert sample.marked(self.SCHEDULE)[0] == Mark("token 4: 3 of 6 layers are SSM now")
        assert sample.crossed_in_prompt(self.SCHEDULE) == [2]

    def test_every_trans_point_is_marked_or_in_the_prompt_or_ahead(self) -> None:
        for start in range(1, 9):
            sample = CrossedSample(prompt="p", pieces=tuple((position, "x") for position in range(start, 10)))
            marked = [part for part in sample.marked(self.SCHEDULE) if isinstance(part, Mark)]
            assert len(marked) + len(sample.crossed_in_prompt(self.SCHEDULE)) == 3

    def test_the_text_is_kept_whole(self) -> None:
        sample = CrossedSample(prompt="p", pieces=((3, "a "), (4, "b\n"), (9, "c")))
        assert "".join(part for part in sample.marked(self.SCHEDULE) if isinstance(part, str)) == "a b\nc"

    @pytest.mark.parametrize("pieces", [(), ((3, "a"), (3, "b")), ((4, "a"), (3, "b")), ((-1, "a"),)])
    def test_positions_must_increase(self, pieces: tuple) -> None:
        with pytest.raises(InputError):
            CrossedSample(prompt="p", pieces=pieces)


class TestReport:
    def test_json_gives_the_same_report(self) -> None:
        report = make_report()
        again = QuickstartReport.from_json(report.to_json())
        assert again == report
        assert isinstance(again.distilled.own.trans_points, TransPointSchedule)

    def test_json_is_plain(self) -> None:
        content = json.loads(make_report().to_json())
        assert content["distilled"]["schedules"][0]["trans_points"] == [0, 4, 64, 256]
        assert content["versions"] == {"python": "3.11.7", "torch": "2.13.0"}

    def test_numbers_that_are_not_finite_survive_as_such(self) -> None:
        report = make_report(
            difference=nan,
            training=((1, 0.1, 5.0), (2, 0.2, inf)),
            distilled=make_measurements(difference=nan),
        )
        text = report.to_json()
        assert "NaN" not in text
        assert "Infinity" not in text
        again = QuickstartReport.from_json(text)
        assert isnan(again.difference)
        assert isnan(again.training[1][2])
        assert isnan(again.distilled.student.nats_per_token)
        assert again.distilled.own.trans_points == OWN

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"converted": []}', "{"])
    def test_what_is_no_report_is_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="not the JSON of a quickstart report"):
            QuickstartReport.from_json(text)

    def test_the_page_opens_with_the_findings_and_holds_everything(self, tmp_path: Path) -> None:
        report = make_report()
        html = report.write_html(tmp_path / "report.html").read_text(encoding="utf-8").replace("&nbsp;", " ")
        findings = report.distilled.findings()
        places = [html.index(text) for text in (findings.headline.split("'")[0], "read 2 k tokens", "<table>", "Kept")]
        assert places == sorted(places)
        assert html.index("It costs") < html.index("<figure>")
        assert html.count("<figure>") == 2 + student_sections(report).count("<figure>")
        for section in ("Learning", "Quality against schedule", "Recall", "Speed and memory", "Text"):
            assert f"<h2>{section}</h2>" in html
        for detail in ("a corpus of 2 MB", "2.13.0", report.command, "17", "1.039", "0, 4, 64, 256", "Return the"):
            assert detail in html

    def test_recall_at_which_both_guess_is_said_and_not_drawn(self) -> None:
        guessing = make_measurements(teacher=make_model(needle=0.12, book=0.13), needle=0.1, book=0.1)
        html = make_report(distilled=guessing).page().render()
        assert "<h2>Recall</h2>" not in html
        assert html.count("neither model does better than guessing") == 2

    def test_only_the_task_with_something_to_show_is_drawn(self) -> None:
        one = make_measurements(teacher=make_model(book=0.13), book=0.1)
        html = make_report(distilled=one).page().render()
        assert "<h2>Recall</h2>" in html
        assert "<td>needle</td>" in html
        assert "<td>phone-book</td>" not in html

    def test_the_sample_is_marked_where_layers_switch(self) -> None:
        html = make_report().page().render()
        assert " first</span>" not in html
        assert ' first<span class="mark">token 4: 2 of 4 layers are SSM now</span> item' in html
        assert '<span class="mark">token 64: 3 of 4 layers are SSM now</span>.' in html

    def test_what_was_not_measured_is_left_out(self) -> None:
        html = make_report(training=(), distillation=(), samples=()).page().render()
        assert "<h2>Text</h2>" not in html
        assert html.count("<figure>") == student_sections(make_report()).count("<figure>")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"converted": at_ratio(1.0)}, "converted has the TransPoints 0,4,64,256; they must all be none"),
            ({"untrained": at_ratio(1.5, own=TransPointSchedule([0, 4, 64, 128]))}, "distilled 0,4,64,256; they must"),
            ({"training": ((1, 2.0),)}, "training has the row"),
        ],
    )
    def test_what_does_not_fit_together_is_refused(self, change: dict, message: str) -> None:
        with pytest.raises(InputError, match=message):
            make_report(**change)


def student_sections(report: QuickstartReport) -> str:
    """The sections that a report on the student alone has."""
    page = Page("")
    report.distilled.add_to(page)
    return page.render()
