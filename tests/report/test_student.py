"""The report on a student says what the numbers say, whoever wins, and survives being written and read."""

import io
from dataclasses import replace
from math import inf, isnan, log, nan
from pathlib import Path

import pytest
from rich.console import Console

from tests.report.student_reports import (
    OWN,
    make_measurements,
    make_model,
    make_student_report,
)
from transmamba.errors import InputError
from transmamba.report import Findings, StudentReport
from transmamba.schedule import TransPointSchedule


def findings(**changes: object) -> Findings:
    return make_measurements(**changes).findings()


def holding(group: tuple[str, ...], words: str) -> list[str]:
    return [sentence for sentence in group if words in sentence]


class TestQuality:
    def test_a_higher_perplexity_is_a_cost_with_its_error(self) -> None:
        found = findings(difference=log(1.2), error=0.01)
        (sentence,) = holding(found.costs, "Perplexity")
        assert "1.200 times the teacher's (between 1.176 and 1.224), measured over 20,000 tokens" in sentence
        assert "The student's perplexity is 1.20 times its teacher's (24.10 against 20.09)" in found.headline

    def test_a_difference_within_the_error_is_none(self) -> None:
        assert holding(findings(difference=0.01, error=0.006).kept, "Perplexity is the teacher's: 1.010 times")
        assert holding(findings(difference=0.01, error=0.004).costs, "Perplexity is higher: 1.010 times")
        assert holding(findings(difference=0.001, error=nan).kept, "1.001 times as high, measured")

    def test_a_lower_perplexity_is_a_gain(self) -> None:
        assert holding(findings(difference=-0.05, error=0.01).gained, "Perplexity is lower: 0.951 times")

    def test_other_next_tokens_are_a_cost_and_equal_ones_kept(self) -> None:
        assert holding(findings(top1=0.7).costs, "same next token as the teacher for 70 %")
        assert holding(findings(top1=0.995).kept, "For 99.5 % of tokens")

    def test_a_loss_that_is_not_finite_is_said(self) -> None:
        found = findings(difference=nan)
        assert holding(found.costs, "The loss is not finite")
        assert "no finite perplexity" in found.headline


class TestSchedules:
    def test_weights_that_are_still_the_teachers_are_kept(self) -> None:
        assert holding(findings(others=(0.05, 0.0)).kept, "With every TransPoint at none, the same weights have")

    def test_weights_that_have_moved_are_a_cost(self) -> None:
        assert holding(
            findings(others=(0.06, 0.05)).costs, "Even with every TransPoint at none its perplexity is 1.051"
        )

    def test_a_perplexity_that_falls_at_every_step_is_a_choice(self) -> None:
        assert holding(findings(others=(0.1, 0.05, 0.0)).gained, "at 4 of them, from its own to none")

    def test_a_perplexity_that_rises_is_said(self) -> None:
        assert holding(findings(others=(0.3, 0.4, 0.0)).costs, "of 3 steps from its own schedule to none, 2 raised")

    def test_one_schedule_says_nothing(self) -> None:
        found = findings(others=())
        assert not [sentence for _, group in found.groups for sentence in group if "TransPoint at none" in sentence]


class TestRecall:
    def test_lost_recall_is_a_cost(self) -> None:
        (sentence,) = holding(findings(needle=0.3).costs, "Needle recall at 128 to 512 tokens of context")
        assert "finds the right one of 8 answers the likeliest 30 % of the time, and writes it exactly 15 %" in sentence
        assert "the teacher 90 % and 45 %. Guessing gives 12.5 % (200 questions)." in sentence

    def test_a_difference_within_the_error_is_kept(self) -> None:
        # Two shares of 200 draws near 0.9 differ by chance by 0.06: twice the root of 2 * 0.9 * 0.1 / 200.
        assert holding(findings(needle=0.85).kept, "Needle recall")
        assert holding(findings(needle=0.82).costs, "Needle recall")
        assert holding(findings(needle=1.0).gained, "Needle recall")

    def test_answers_that_are_no_longer_written_are_a_cost_though_they_are_chosen(self) -> None:
        measured = make_measurements()
        rows = tuple(replace(row, exact=0.1) for row in measured.student.recall)
        found = replace(measured, student=replace(measured.student, recall=rows)).findings()
        assert holding(found.costs, "Needle recall")

    def test_where_the_teacher_guesses_nothing_is_known(self) -> None:
        found = findings(teacher=make_model(book=0.15), book=0.13)
        assert holding(found.unknown, "Phone-book recall at 128 to 512 tokens of context: neither model does better")

    def test_without_recall_there_is_no_word_of_it(self) -> None:
        measured = make_measurements()
        bare = replace(measured, student=replace(measured.student, recall=(), recall_by_depth=()))
        assert "recall" not in str(bare.findings()).lower()
        assert "phone" not in make_student_report(bare).page().render()


class TestMemoryAndSpeed:
    def test_a_bounded_cache_is_a_gain(self) -> None:
        (sentence,) = holding(findings().gained, "cache")
        assert "At 512 tokens its cache takes 12 % of the teacher's memory (64 kB against 512 kB)" in sentence
        assert sentence.endswith("does not grow any more, however long the text.")

    def test_a_cache_that_grows_is_said_to(self) -> None:
        (sentence,) = holding(findings(own=TransPointSchedule([0, 4, None, None])).gained, "cache")
        assert sentence.endswith("goes on growing: 2 of 4 layers never switch.")

    def test_a_cache_that_will_stop_growing_is_said_to(self) -> None:
        (sentence,) = holding(findings(own=TransPointSchedule([0, 4, 64, 2000])).gained, "cache")
        assert sentence.endswith("stops growing at token 2,000.")

    def test_a_larger_cache_is_a_cost(self) -> None:
        assert holding(findings(cache=9000).costs, "cache takes 225 % of")

    @pytest.mark.parametrize(
        ("speed", "group", "words"),
        [
            (200.0, "gained", "Writing after 512 tokens is 2.00 times faster: 200 tokens per second against 100."),
            (50.0, "costs", "Writing after 512 tokens is 2.00 times slower: 50 tokens per second against 100."),
            (103.0, "kept", "Writing after 512 tokens is as fast as the teacher's"),
        ],
    )
    def test_speed_goes_where_it_belongs(self, speed: float, group: str, words: str) -> None:
        assert holding(getattr(findings(speed=speed), group), words)

    def test_speed_is_compared_at_the_longest_common_length(self) -> None:
        measured = make_measurements()
        short = replace(measured.teacher, speed=measured.teacher.speed[:1])
        found = replace(measured, teacher=short).findings()
        assert "After 128 tokens of text" in found.headline
        assert not holding(found.gained, "512 tokens")

    def test_without_speed_there_is_no_word_of_it(self) -> None:
        measured = make_measurements()
        bare = replace(measured, student=replace(measured.student, speed=()))
        assert "cache" not in str(bare.findings()).lower()
        assert "cache of one sequence" not in make_student_report(bare).page().render()


def test_every_sentence_ends_and_no_group_is_empty() -> None:
    for found in (findings(), findings(difference=nan), findings(others=()), findings(teacher=make_model(book=0.1))):
        assert all(label and sentences for label, sentences in found.groups)
        sentences = [found.headline, *(sentence for _, group in found.groups for sentence in group)]
        assert all(sentence.endswith(".") for sentence in sentences)


def test_the_summary_has_a_row_for_each_measure() -> None:
    headers, rows = make_measurements().summary()
    assert {len(row) for row in rows} == {len(headers)}
    table = {row[0]: row[1:] for row in rows}
    assert table["parameters"] == ["1 M", "1.06 M", "1.06"]
    assert table["perplexity"] == ["20.09", "24.10", "1.20"]
    assert table["needle: right choice of 8"] == ["90 %", "90 %", ""]
    assert table["cache at 512"] == ["512 kB", "64 kB", "0.12"]


def test_the_page_has_findings_before_the_table_before_the_figures() -> None:
    report = make_student_report()
    html = report.page().render()
    found = report.measured.findings()
    places = [html.index(words) for words in ("perplexity is", "Kept", "It costs", "<table", "<figure>")]
    assert places == sorted(places)
    assert html.count("<figure>") == 10
    for _, group in found.groups:
        assert all(sentence.split(",")[0].split("%")[0].split("'")[0].strip() in html for sentence in group)
    assert "transmamba report my-student --against my-teacher" in html
    assert "https://" not in html


def test_a_page_can_be_made_of_little() -> None:
    measured = make_measurements(others=())
    bare = replace(
        measured,
        teacher=replace(measured.teacher, recall=(), recall_by_depth=(), speed=(), loss_by_position=()),
        student=replace(measured.student, recall=(), recall_by_depth=(), speed=(), loss_by_position=()),
        agreement=(),
    )
    assert make_student_report(bare).page().render().count("<figure>") == 1


def test_json_comes_back(tmp_path: Path) -> None:
    report = make_student_report()
    path = report.write_json(tmp_path / "report.json")
    again = StudentReport.from_json(path.read_text())
    assert again == report
    assert isinstance(again.measured.own.trans_points, TransPointSchedule)


def test_what_is_not_finite_comes_back_as_nan() -> None:
    measured = make_measurements(difference=inf, error=nan)
    text = make_student_report(measured).to_json()
    assert "Infinity" not in text
    assert "NaN" not in text
    again = StudentReport.from_json(text).measured
    assert isnan(again.own.loss_difference)
    assert isnan(again.student.nats_per_token)
    assert again.student.speed[0].peak_bytes is None
    assert again.student.recall[0].depth is None
    assert again.own.trans_points == OWN


@pytest.mark.parametrize("text", ["{", "[]", '{"measured": {}}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not the JSON of a report on a student"):
        StudentReport.from_json(text)


def test_the_first_schedule_is_the_students_own() -> None:
    measured = make_measurements()
    with pytest.raises(InputError, match="they must be the same"):
        replace(measured, schedules=measured.schedules[1:])
    with pytest.raises(InputError, match="schedules is empty"):
        replace(measured, schedules=())


def test_the_terminal_shows_table_and_findings() -> None:
    out = io.StringIO()
    make_student_report().print_table(Console(file=out, width=200))
    text = out.getvalue()
    for words in ("perplexity", "needle: right choice of 8", "It costs", "1.200 times the teacher's", "12 %"):
        assert words in text
