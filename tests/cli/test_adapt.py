"""transmamba adapt."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.conversion.text_teachers import write_bert
from tests.recipes.adaptations import write_teacher
from tests.recipes.sentence_runs import write_captions, write_text
from transmamba.cli.main import main

SMALL = {
    "hidden_size": "12",
    "num_hidden_layers": "2",
    "images.image_size": "8",
    "images.train_share": "0.05",
    "batch_size": "32",
    "epochs": "1",
}


def flags(folder: Path, *more: str) -> list[str]:
    named = {"--teacher": folder / "teacher", "--student": "vim_tiny", "--output": folder / "run", "--device": "cpu"}
    given = [str(text) for pair in named.items() for text in pair]
    return ["adapt", *given, *(word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")), *more]


def test_a_student_is_adapted_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_teacher(tmp_path)
    assert main(flags(tmp_path, "--recipe", "adapt_v1")) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("top-1", "top-5", "of the parameters", "report"))
    assert (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["loss"]["version"] == "v1"


def test_a_dry_run_prints_the_table_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_teacher(tmp_path)
    assert main(flags(tmp_path, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "(deit) -> vim, ranking magnitude" in out
    assert "backbone.layers.1.mixer.in_proj.weight[0:24]" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "retrieval"], "task='retrieval' is unknown; there is image-classification and sentence-embedding"),
        (["--recipe", "adapt_v3"], "There is no recipe 'adapt_v3'. Did you mean 'adapt_v"),
        (["--set", "layer_decay=0"], "layer_decay=0.0 must be above 0"),
        (["--set", "loss.layer_weights=best"], "layer_weights='best' is unknown"),
        (["--data", "nowhere"], "nowhere is no folder"),
        (["--set", "images.image_size=16"], "set images.image_size=8"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    write_teacher(tmp_path)
    capsys.readouterr()
    assert main(flags(tmp_path, *more)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def sentence_flags(folder: Path, *more: str) -> list[str]:
    write_bert(folder)
    named = {"--teacher": folder / "teacher", "--data": write_text(folder), "--output": folder / "run"}
    given = [str(text) for pair in named.items() for text in pair]
    fields = {
        "text.document_separator": "\n\n",
        "max_length": "36",
        "batch_size": "8",
        "texts": "16",
        "eval_texts": "8",
    }
    sets = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    return ["adapt", "--task", "sentence-embedding", "--device", "cpu", *given, *sets, *more]


def test_a_sentence_encoder_is_adapted_and_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(sentence_flags(tmp_path, "--set", f"captions={write_captions(tmp_path)}")) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("cosine with the teacher", "student, recall at 1", "among 4 photos"))
    assert (tmp_path / "run" / "model" / "modules.json").is_file()
    assert main(sentence_flags(tmp_path, "--dry-run")) == 0
    assert "(bert) -> bimamba2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "adapt_sentence"], "Did you mean 'adapt_sentences'?"),
        (["--student", "vim_tiny"], "student='vim_tiny' is unknown"),
        (["--data", "nowhere"], "There is no file or folder 'nowhere'"),
    ],
)
def test_mistakes_with_sentences_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    arguments = sentence_flags(tmp_path, *more)
    capsys.readouterr()
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def write_images(folder: Path, *, broken: bool = False) -> Path:
    """Two classes of six pictures, of which one is none where broken."""
    for name, level in (("dark", 10), ("light", 240)):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (9, 8), (level, level + number, level)).save(folder / "images" / name / f"{number}.png")
    if broken:
        (folder / "images" / "dark" / "3.png").write_bytes(b"no picture")
    return folder / "images"


@pytest.mark.parametrize(
    ("teacher", "broken", "more", "message"),
    [
        (
            {"image_size": 16},
            False,
            ["--set", "images.image_size=8"],
            "reads images of 16 pixels and images.image_size is 8",
        ),
        ({}, False, [], "has 10 classes and"),
        ({"num_labels": 2}, True, [], "1 of 12 files in"),
        ({"num_labels": 2}, False, ["--set", "hidden_size=24"], "the student is wider than its teacher"),
    ],
)
def test_what_does_not_fit_is_one_line_at_the_command_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    teacher: dict[str, int],
    broken: bool,
    more: list[str],
    message: str,
) -> None:
    write_teacher(tmp_path, **teacher)
    images = write_images(tmp_path, broken=broken)
    capsys.readouterr()
    few = ["--data", str(images), "--set", "batch_size=4", "--set", "images.train_share=1"]
    assert main(flags(tmp_path, *few, *more)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    if broken:
        assert str(images / "dark" / "3.png") in err
        assert main(flags(tmp_path, *few, "--set", "images.on_corrupt=skip")) == 0


def test_images_have_the_teachers_size_by_default(tmp_path: Path) -> None:
    write_teacher(tmp_path, image_size=16, num_labels=2)
    words = flags(
        tmp_path, "--data", str(write_images(tmp_path)), "--set", "batch_size=4", "--set", "images.train_share=1"
    )
    at = words.index("images.image_size=8")
    assert main(words[: at - 1] + words[at + 1 :]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["images"]["image_size"] == 16
    assert main([*words[: at - 1], *words[at + 1 :], "--resume"]) == 0  # the same run, though its words say no size


def test_an_empty_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_teacher(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a", "b"):
        (tmp_path / "classes" / name).mkdir(parents=True)
    capsys.readouterr()
    assert main(flags(tmp_path, "--data", str(tmp_path / "empty"))) == 2
    assert "holds 0 folders; there must be one for each class" in capsys.readouterr().err
    assert main(flags(tmp_path, "--data", str(tmp_path / "classes"))) == 2
    assert "holds no image" in capsys.readouterr().err
