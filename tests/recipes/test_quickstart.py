"""The quickstart at toy size: everything is written, and twice the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from transmamba.errors import RecipeError
from transmamba.recipes import quickstart
from transmamba.report import QuickstartReport

TOY = replace(
    quickstart.SMOKE, tokens=1024, seq_len=128, hidden_size=32, intermediate_size=32, lengths=(32, 128), new_tokens=70
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


def losses(report: QuickstartReport) -> list[tuple[object, ...]]:
    return [(run.name, run.bits_per_byte, [loss for _, _, loss in run.training_curve]) for run in report.runs]


def test_it_writes_everything_and_repeats_itself(tmp_path: Path) -> None:
    first = quickstart.run_quickstart(tmp_path / "first", size=TOY, seed=3)
    second = quickstart.run_quickstart(tmp_path / "second", size=TOY, seed=3)
    assert losses(first) == losses(second)
    assert losses(first) != losses(quickstart.run_quickstart(tmp_path / "third", size=TOY, seed=4))

    folder = tmp_path / "first"
    assert "http" not in (folder / "report.html").read_text().replace("http://www.w3.org", "")
    assert QuickstartReport.from_json((folder / "report.json").read_text()).subject == "TransMamba V9"
    for schedule, form, learning_rate in quickstart.MODELS.values():
        recipe = json.loads((folder / schedule / "run.json").read_text())["recipe"]
        assert (recipe["model"]["mixer_form"], recipe["learning_rate"]) == (form, learning_rate)
        assert (folder / schedule / "model" / "model.safetensors").is_file()


def test_models_have_equal_size_and_the_sample_crosses_trans_points(tmp_path: Path) -> None:
    report = quickstart.run_quickstart(tmp_path / "run", size=TOY)
    sizes = [run.num_parameters for run in report.runs]
    assert max(sizes) - min(sizes) <= 3 * TOY.hidden_size * TOY.num_hidden_layers
    positions = [position for position, _ in report.samples[0].pieces]
    crossed = [point for point in report.subject_run.trans_points if point and positions[0] < point <= positions[-1]]
    assert crossed


def test_an_earlier_quickstart_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    quickstart._claim_folder(folder)
    (folder / "old").touch()
    quickstart._claim_folder(folder)
    assert not (folder / "old").exists()

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").touch()
    with pytest.raises(RecipeError, match="not a quickstart"):
        quickstart._claim_folder(other)
    assert (other / "chapter.txt").exists()
