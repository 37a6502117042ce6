"""A converted folder is whole and checked against its source, or is not there."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from tests.conversion.checkpoints import save_source, tiny_source, tiny_tokenizer, token_ids
from transmamba import TransMambaForCausalLM
from transmamba.conversion import LARGEST_DIFFERENCE, convert_checkpoint, relative_logit_difference
from transmamba.conversion import folder as folder_module
from transmamba.conversion.folder import CALIBRATION_WINDOWS, token_windows
from transmamba.errors import CheckpointError, InputError
from transmamba.inference import load_checkpoint

TEXTS = ["The state of a layer is what it remembers of the text. " * 40, "short"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = tiny_source("Llama 3.1")
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, pad_token_id=0)
    return save_source(model, tmp_path / "source", max_shard_size="20KB")


def test_everything_travels_along(source: Path, tmp_path: Path) -> None:
    done = convert_checkpoint(source, tmp_path / "deep" / "out", schedule=[0, 9, None], texts=TEXTS)
    student, tokenizer = load_checkpoint(done.folder)
    assert student.config.trans_points == [0, 9, None]
    assert tokenizer("Zürich").input_ids == AutoTokenizer.from_pretrained(source)("Zürich").input_ids
    assert tokenizer.eos_token == "<end>"
    assert (student.generation_config.do_sample, student.generation_config.temperature) == (True, 0.7)
    assert relative_logit_difference(tiny_source("Llama 3.1"), student, token_ids(1, 20)) < LARGEST_DIFFERENCE
    assert done.checked == ("random tokens", "text")
    assert done.difference < LARGEST_DIFFERENCE
    table = json.loads((done.folder / "conversion.json").read_text())
    assert table["max_relative_logit_difference"] == done.difference
    assert table["initialisation"] == done.plan.initialisation == "calibrated"
    assert {row["target"] for row in table["parameters"]} == {name for name, _ in student.named_parameters()}
    assert any(row["initial_value"].startswith("fitted") for row in table["parameters"] if row["kind"] == "fresh")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_half_precision_is_kept_and_checked_in_fp32(tmp_path: Path) -> None:
    tiny_source("Qwen2").to(torch.float16).save_pretrained(tmp_path / "source")
    done = convert_checkpoint(tmp_path / "source", tmp_path / "out", initialisation="local")
    student = TransMambaForCausalLM.from_pretrained(done.folder)
    assert student.dtype == torch.float16
    assert done.checked == ("random tokens",)
    assert not (done.folder / "tokenizer.json").exists()


def test_a_folder_that_holds_something_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(InputError, match=r"out holds something already; give a folder that is empty"):
        convert_checkpoint(source, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    with pytest.raises(InputError, match="holds something already"):
        convert_checkpoint(source, out / "mine")


def test_an_empty_folder_is_filled_and_remains_of_a_killed_conversion_are_swept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "junk").touch()
    convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()
    assert not (tmp_path / "out" / "junk").exists()


def test_a_student_that_is_not_its_source_is_not_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = folder_module.build_student

    def build_wrongly(*args: object, **kwargs: object) -> TransMambaForCausalLM:
        student = build(*args, **kwargs)
        with torch.no_grad():
            student.model.layers[1].mixer.q_proj.weight[0, 0] += 0.01
        return student

    monkeypatch.setattr(folder_module, "build_student", build_wrongly)
    with pytest.raises(CheckpointError, match=r"logits differ from the source's by .* nothing was written"):
        convert_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_source_that_overflows_is_said_to(tmp_path: Path) -> None:
    model = tiny_source("Llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match="the source's logits are not finite"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_read_is_named(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"The tokenizer in .* cannot be loaded"):
        convert_checkpoint(source, tmp_path / "out")
    (source / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is truncated or not JSON"):
        convert_checkpoint(source, tmp_path / "out")


def test_what_travels_along_is_looked_at_before_any_work(source: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(source)
    with pytest.raises(CheckpointError, match="the tokenizer has 258 entries and the model 257"):
        convert_checkpoint(source, tmp_path / "out")
    tiny_tokenizer().save_pretrained(source)
    (source / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is truncated or not JSON"):
        convert_checkpoint(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_calibration_windows_come_from_all_over_the_texts(source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [chr(65 + number) * 40 for number in range(26)]
    windows = token_windows(tokenizer, texts, 32)
    assert windows.shape == (CALIBRATION_WINDOWS, 32)
    assert len({tuple(window) for window in windows.tolist()}) == CALIBRATION_WINDOWS
    long = "".join(chr(97 + number) * 8192 for number in range(26))
    windows = token_windows(tokenizer, [long], 32)
    assert len({tuple(window) for window in windows.tolist()}) == CALIBRATION_WINDOWS
    assert token_windows(tokenizer, ["short", ""], 32) is None
    assert token_windows(tokenizer, [], 32) is None
