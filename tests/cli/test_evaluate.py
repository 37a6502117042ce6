"""transmamba evaluate."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conversion.checkpoints import save_source, tiny_source
from tests.conversion.text_teachers import write_bert
from tests.recipes.sentence_runs import write_captions
from tests.training.toy import toy_run
from transmamba import convert
from transmamba.cli.main import main
from transmamba.recipes import train_language_model

TEXT = "the state space converts memory to the prefix, and then scans on. " * 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return train_language_model(toy_run(tmp_path, max_steps=2), device="cpu").folder


def test_a_run_is_scored_on_its_validation_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(folder / "model"), "--device", "cpu", "--json", str(folder / "score.json")]) == 0
    out = capsys.readouterr().out
    for part in ("nats per token", "bits per byte", "by position in the document", "16 to 31"):
        assert part in out
    trained, scored = (json.loads((folder / name).read_text()) for name in ("evaluation.json", "score.json"))
    assert scored["num_tokens"] == trained["num_tokens"]
    assert scored["loss"] == pytest.approx(trained["loss"], rel=1e-5)  # the same in batches of another size
    assert scored["trans_points"] == [0, 8, None]


def test_another_text_and_another_schedule_can_be_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = folder.parent / "other.txt"
    text.write_text(TEXT)
    losses = []
    for number, schedule in enumerate(("0,8,none", "mamba2")):
        path = folder.parent / f"{number}.json"
        flags = ["--text", str(text), "--trans-points", schedule, "--json", str(path), "--device", "cpu"]
        assert main(["evaluate", str(folder), *flags]) == 0
        content = json.loads(path.read_text())
        losses.append(content["loss"])
        assert content["text"] == str(text)
    assert "TransPoints 0,0,0" in capsys.readouterr().out
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["absent"], "There is no folder absent, and it could not be had as a Hugging Face id"),
        (["./absent"], "There is no ./absent;"),
        (["{folder}", "--text", "absent.txt"], "absent.txt"),
        (["{folder}", "--trans-points", "0,0"], "2"),
        (["{folder}", "--json", "absent/score.json"], "there is no folder absent"),
        (["{folder}", "--device", "tpu"], "device 'tpu' is not"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    capsys.readouterr()
    assert main(["evaluate", *(argument.format(folder=folder) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err


def test_a_truncated_checkpoint_is_said_to_be_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(folder / "model" / "model.safetensors", 1000)
    assert main(["evaluate", str(folder), "--device", "cpu"]) == 2
    assert "model.safetensors is truncated or damaged" in capsys.readouterr().err


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """A Llama, its conversion with every TransPoint None, and something to score."""
    source = save_source(tiny_source("Llama"), tmp_path / "llama")
    save_source(convert(source)[0], tmp_path / "student")
    (tmp_path / "text.txt").write_text(TEXT)
    documents = [TEXT[start : start + 37 * start + 9] for start in range(9)]  # several to a window, and longer ones
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    rows = [{"context": "The state", "choices": [f"{word} on", "ends"], "label": 0} for word in ("scans", "goes", "x")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return {"source": source, "student": tmp_path / "student", "folder": tmp_path}


def evaluate_both(pair: dict[str, Path], *flags: str) -> list[dict]:
    found = []
    for name in ("source", "student"):
        path = pair["folder"] / f"{name}.json"
        assert main(["evaluate", str(pair[name]), *flags, "--device", "cpu", "--json", str(path)]) == 0
        found.append(json.loads(path.read_text()))
    return found


def test_a_source_and_its_student_are_scored_by_the_same_command(
    pair: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, student = evaluate_both(pair, "--text", str(pair["folder"] / "texts.jsonl"), "--seq-len", "40")
    assert student["loss"] == pytest.approx(source["loss"], rel=1e-6)
    assert (source["num_tokens"], source["seq_len"]) == (student["num_tokens"], 40)
    assert (source["trans_points"], student["trans_points"]) == (None, [None, None, None])
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_tasks_are_scored_and_written_with_versions(pair: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'transmamba[eval]'")
    rows = str(pair["folder"] / "rows.jsonl")
    source, student = evaluate_both(pair, "--tasks", rows, "--limit", "2", "--batch-size", "3")
    assert source["scores"] == student["scores"]
    assert [(score["task"], score["metric"], score["num_samples"]) for score in source["scores"]] == [
        ("rows", "acc", 2),
        ("rows", "acc_norm", 2),
    ]
    assert set(source["versions"]) == {"datasets", "lm_eval", "python", "tasks", "torch", "transformers", "transmamba"}
    assert (source["tasks"], source["limit"], source["batch_size"], source["dtype"]) == ([rows], 2, 3, "float32")
    out = capsys.readouterr().out
    for part in ("rows", "acc_norm ↑", "± error", f"{pair['student']} on lm-eval, TransPoints none,none,none"):
        assert part in out


def test_half_precision_is_scored_in_fp32_on_a_cpu(pair: dict[str, Path]) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'transmamba[eval]'")
    for name in ("source", "student"):
        save_source(tiny_source("Llama").half() if name == "source" else convert(pair["source"])[0], pair[name])
    source, student = evaluate_both(pair, "--tasks", str(pair["folder"] / "rows.jsonl"))
    assert source["dtype"] == student["dtype"] == "float32"
    assert source["scores"] == student["scores"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--tasks", "{folder}/rows.jsonl", "--text", "x.txt"],
            "--tasks scores tasks, and --text and --seq-len are for",
        ),
        (["--limit", "3"], "--task-folder, --limit and --num-fewshot are for tasks; name some with --tasks"),
        (["--text", "{folder}/text.txt", "--seq-len", "1"], "--seq-len 1 must be at least 2"),
        (["--text", "{folder}/text.txt", "--seq-len", "129"], "seq_len=129 is longer than the 128 positions"),
        (["--text", "{folder}/text.txt", "--trans-points", "mamba2"], "is a LlamaForCausalLM and has no TransPoints"),
        ([], "lies in no run"),
    ],
    ids=str,
)
def test_a_mistake_with_another_model_is_one_line(
    pair: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(pair["source"]), *(part.format(**pair) for part in arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert line in err


def test_where_lm_eval_is_absent_the_extra_is_named(
    pair: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    capsys.readouterr()
    assert main(["evaluate", str(pair["student"]), "--tasks", "arc_easy", "--device", "cpu"]) == 2
    assert "lm_eval is not installed: pip install 'transmamba[eval]'" in capsys.readouterr().err


def test_a_sentence_encoder_is_scored_on_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, captions = str(write_bert(tmp_path)), str(write_captions(tmp_path))
    out = tmp_path / "score.json"
    assert main(["evaluate", teacher, "--captions", captions, "--device", "cpu", "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("recall at 1", "recall at 10", "of 4"))
    assert json.loads(out.read_text())["captions"]["num_questions"] == 8
    assert main(["evaluate", teacher, "--captions", captions, "--seq-len", "8"]) == 2
    assert "--captions takes --batch-size, --device and --json" in capsys.readouterr().err
