"""The report says what the numbers say, whoever wins, and survives being written and read."""

import io
import json
from dataclasses import replace
from math import inf, isnan, nan
from pathlib import Path

import pytest
from rich.console import Console

from tests.report.reports import SCHEDULES, make_report, make_run
from transmamba.errors import InputError
from transmamba.report import CrossedSample, Mark, ModelRun, QuickstartReport
from transmamba.schedule import TransPointSchedule


def findings(*runs: ModelRun) -> str:
    return " ".join(make_report(*runs).findings())


class TestFindings:
    def test_the_winner_is_named_and_the_distance_given(self) -> None:
        text = findings(
            make_run("Transformer", bits_per_byte=2.5),
            make_run("Mamba-2", bits_per_byte=2.0),
            make_run("V9", bits_per_byte=1.9),
        )
        assert "After 2 k tokens each, V9 reaches the lowest validation loss: 1.900 bits per byte." in text
        assert (
            "The loss of V9 is 5.0 % below that of the best baseline, Mamba-2 (1.900 against 2.000; lower is better)."
            in text
        )

    def test_a_loss_is_said_when_v9_loses(self) -> None:
        text = findings(
            make_run("Transformer", bits_per_byte=2.5),
            make_run("Mamba-2", bits_per_byte=2.0),
            make_run("V9", bits_per_byte=2.1),
        )
        assert "Mamba-2 reaches the lowest validation loss: 2.000" in text
        assert "The loss of V9 is 5.0 % above that of the best baseline, Mamba-2 (2.100 against 2.000" in text

    def test_a_tie_names_both(self) -> None:
        text = findings(
            make_run("Transformer", bits_per_byte=2.5),
            make_run("Mamba-2", bits_per_byte=2.0),
            make_run("V9", bits_per_byte=2.0),
        )
        assert "Mamba-2 and V9 reach the lowest validation loss: 2.000" in text
        assert "The loss of V9 is equal to that of the best baseline" in text

    def test_a_run_that_diverged_is_said_and_does_not_win(self) -> None:
        text = findings(make_run("Transformer", bits_per_byte=nan), make_run("V9", bits_per_byte=2.0))
        assert "Transformer has no finite validation loss: its training diverged." in text
        assert "V9 reaches the lowest validation loss: 2.000" in text
        assert "best baseline" not in text

    def test_nothing_is_claimed_when_v9_diverged(self) -> None:
        text = findings(make_run("Transformer"), make_run("V9", bits_per_byte=inf))
        assert "V9 has no finite validation loss" in text
        assert "The loss of V9" not in text

    def test_all_may_diverge(self) -> None:
        text = findings(make_run("Transformer", bits_per_byte=nan), make_run("V9", bits_per_byte=nan))
        assert "lowest" not in text
        assert text.count("diverged") == 2

    def test_one_run_alone_is_compared_with_nothing(self) -> None:
        text = findings(make_run("V9", bits_per_byte=1.5))
        assert text == "After 2 k tokens, V9 reaches a validation loss of 1.500 bits per byte."

    def test_unequal_training_is_not_called_equal(self) -> None:
        shorter = replace(make_run("Transformer"), training_curve=((1000, 1.0, 3.0),))
        assert "After 1 k to 2 k tokens, " in findings(shorter, make_run("V9"))

    @pytest.mark.parametrize(
        ("ours", "words"),
        [
            (250, "takes 256 kB, 25 % of what Transformer needs (1.02 MB)"),
            (12, "takes 12.3 kB, 1.2 % of what Transformer needs (1.02 MB)"),
            (1000, "takes 1.02 MB, as much as that of Transformer"),
            (1500, "takes 1.54 MB, 1.50 times what Transformer needs (1.02 MB)"),
        ],
    )
    def test_the_cache_is_compared_with_the_transformer(self, ours: int, words: str) -> None:
        text = findings(make_run("Mamba-2", cache=1), make_run("Transformer", cache=1000), make_run("V9", cache=ours))
        assert f"At 1,024 tokens of context the cache of V9 {words}." in text

    @pytest.mark.parametrize(("ours", "times"), [(100.0, "2.00"), (25.0, "0.50")])
    def test_decoding_is_compared_with_the_transformer(self, ours: float, times: str) -> None:
        text = findings(make_run("Transformer", decode=50.0), make_run("V9", decode=ours))
        assert f"V9 generates {ours:.0f} tokens per second, {times} times as many as Transformer (50)." in text

    def test_only_lengths_that_both_were_measured_at_are_compared(self) -> None:
        short = replace(make_run("Transformer"), cache=((64, 100), (256, 400)), decode=())
        text = findings(short, make_run("V9", cache=1))
        assert "At 256 tokens of context the cache of V9 takes 256 B, 64 % of what Transformer needs (400 B)." in text
        assert "generates" not in text

    def test_without_a_transformer_the_first_baseline_is_the_rival(self) -> None:
        assert "what hybrid needs" in findings(make_run("hybrid"), make_run("Mamba-2"), make_run("V9", cache=10))


class TestSample:
    SCHEDULE = TransPointSchedule([0, 2, 4, 6, 6, None])

    def test_marks_stand_before_the_token_that_switches(self) -> None:
        sample = CrossedSample(model="m", prompt="p", pieces=((3, "a"), (4, "b"), (6, "c")))
        assert sample.marked(self.SCHEDULE) == [
            "a",
            Mark("token 4: 3 of 6 layers are SSM now"),
            "b",
            Mark("token 6: 5 of 6 layers are SSM now"),
            "c",
        ]
        assert sample.crossed_in_prompt(self.SCHEDULE) == [2]

    def test_a_switch_at_the_first_generated_token_is_marked(self) -> None:
        sample = CrossedSample(model="m", prompt="p", pieces=((4, "b"), (5, "c")))
        assert sample.marked(self.SCHEDULE)[0] == Mark("token 4: 3 of 6 layers are SSM now")
        assert sample.crossed_in_prompt(self.SCHEDULE) == [2]

    def test_every_trans_point_is_marked_or_in_the_prompt_or_ahead(self) -> None:
        for start in range(1, 9):
            sample = CrossedSample(
                model="m", prompt="p", pieces=tuple((position, "x") for position in range(start, 10))
            )
            marked = [part for part in sample.marked(self.SCHEDULE) if isinstance(part, Mark)]
            assert len(marked) + len(sample.crossed_in_prompt(self.SCHEDULE)) == 3

    def test_the_text_is_kept_whole(self) -> None:
        sample = CrossedSample(model="m", prompt="p", pieces=((3, "a "), (4, "b\n"), (9, "c")))
        assert "".join(part for part in sample.marked(self.SCHEDULE) if isinstance(part, str)) == "a b\nc"

    @pytest.mark.parametrize("pieces", [(), ((3, "a"), (3, "b")), ((4, "a"), (3, "b")), ((-1, "a"),)])
    def test_positions_must_increase(self, pieces: tuple) -> None:
        with pytest.raises(InputError):
            CrossedSample(model="m", prompt="p", pieces=pieces)


class TestReport:
    def test_json_gives_the_same_report(self) -> None:
        report = make_report()
        again = QuickstartReport.from_json(report.to_json())
        assert again == report
        assert all(isinstance(run.trans_points, TransPointSchedule) for run in again.runs)

    def test_json_is_plain(self) -> None:
        content = json.loads(make_report().to_json())
        assert content["runs"][3]["trans_points"] == [0, 4, 64, None]
        assert content["versions"] == {"python": "3.11.7", "torch": "2.13.0"}

    def test_losses_that_are_not_finite_survive_as_such(self) -> None:
        run = replace(make_run("V9", bits_per_byte=nan), training_curve=((1, 0.1, 5.0), (2, 0.2, inf)))
        text = make_report(run).to_json()
        assert "NaN" not in text
        assert "Infinity" not in text
        again = QuickstartReport.from_json(text).runs[0]
        assert isnan(again.bits_per_byte)
        assert isnan(again.training_curve[1][2])
        assert again.trans_points == [0, 4, 64, None]

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": []}', "{"])
    def test_what_is_no_report_is_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="not the JSON of a quickstart report"):
            QuickstartReport.from_json(text)

    def test_the_page_opens_with_the_findings_and_holds_everything(self, tmp_path: Path) -> None:
        report = make_report(make_run("Transformer"), make_run("Mamba-2"), make_run("V9", bits_per_byte=1.75))
        html = report.write_html(tmp_path / "report.html").read_text(encoding="utf-8").replace("&nbsp;", " ")
        places = [html.index(sentence) for sentence in report.findings()]
        assert places == sorted(places)
        assert places[-1] < html.index("<table>") < html.index("<figure>")
        assert html.count("<figure>") == 7
        for detail in ("a corpus of 2 MB", "2.13.0", report.command, "17", "1.750", "0, 4, 64, none", "Return the"):
            assert detail in html

    def test_the_sample_is_marked_where_layers_switch(self) -> None:
        html = make_report().page().render()
        assert " first</span>" not in html
        assert ' first<span class="mark">token 4: 2 of 4 layers are SSM now</span> item' in html
        assert '<span class="mark">token 64: 3 of 4 layers are SSM now</span>.' in html

    def test_what_was_not_measured_is_left_out(self) -> None:
        bare = replace(make_run("V9"), training_curve=(), loss_by_position=(), prefill=(), decode=(), cache=())
        report = make_report(bare, samples=())
        html = report.page().render()
        assert html.count("<figure>") == 2
        assert "<h2>Text</h2>" not in html

    def test_a_page_of_diverged_runs_can_be_drawn(self) -> None:
        runs = [replace(make_run(name, bits_per_byte=nan), training_curve=((1, 0.1, nan),)) for name in SCHEDULES]
        assert make_report(*runs).page().render().count("its training diverged") == 4

    def test_the_table_has_a_row_per_model_and_the_findings(self) -> None:
        stream = io.StringIO()
        report = make_report()
        report.print_table(Console(file=stream, width=200))
        printed = stream.getvalue()
        for run in report.runs:
            assert f"\n{run.name} " in printed
        assert "1.23 M" in printed
        assert "1 min 1 s" in printed
        for sentence in report.findings():
            assert sentence in printed

    def test_names_in_brackets_are_printed_as_they_are(self) -> None:
        stream = io.StringIO()
        make_report(make_run("V9 [red]")).print_table(Console(file=stream, width=200))
        assert stream.getvalue().count("V9 [red]") == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"subject": "V8"}, "The subject is 'V8'"),
            ({"samples": (CrossedSample(model="V8", prompt="", pieces=((0, "a"),)),)}, "The model of a sample is 'V8'"),
            ({"runs": (make_run("V9"), make_run("V9"))}, "names of their own"),
        ],
    )
    def test_names_must_fit_together(self, change: dict, message: str) -> None:
        with pytest.raises(InputError, match=message):
            make_report(**change)

    def test_rows_of_the_wrong_width_are_refused(self) -> None:
        with pytest.raises(InputError, match="decode of 'V9' has the row"):
            replace(make_run("V9"), decode=((1, 2.0, 3.0),))

    def test_a_mixer_form_must_be_known(self) -> None:
        with pytest.raises(InputError, match="mixer_form='plain'"):
            replace(make_run("V9"), mixer_form="plain")
