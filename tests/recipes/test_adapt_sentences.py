"""Adaptations of sentence encoders: every recipe is carried out, resumes exactly, and what it leaves loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel

from tests.conversion.text_teachers import letter_tokenizer, write_bert
from tests.recipes.sentence_runs import toy_run, write_captions, write_text
from transmamba.data import SentenceDataset, make_sentences
from transmamba.distillation import SentenceLoss
from transmamba.errors import CheckpointError, CorpusError, InputError, RecipeError, TransMambaError
from transmamba.inference import embed_texts, load_text_encoder
from transmamba.recipes import (
    SENTENCE_ADAPTATIONS,
    EncoderSettings,
    EncoderSubcloning,
    adapt_sentence_encoder,
    plan_sentence_adaptation,
)
from transmamba.report import html


@pytest.fixture(autouse=True)
def drawn_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes longer than the runs; tests/report draws them."""
    monkeypatch.setattr(html, "_svg", lambda figure: b"<svg/>")


FILES = {"1-student", "evaluation.json", "model", "report.html", "run.json"}


@pytest.mark.parametrize("recipe", SENTENCE_ADAPTATIONS)
def test_every_recipe_leaves_a_student_and_its_scores(tmp_path: Path, recipe: str) -> None:
    write_bert(tmp_path)
    write_text(tmp_path)
    run = toy_run(tmp_path, recipe, captions=str(write_captions(tmp_path)), eval_every=2)
    done = adapt_sentence_encoder(run, device="cpu")
    assert {path.name for path in done.folder.iterdir()} == FILES | ({"subcloning.json"} if done.plan else set())
    content = json.loads((done.folder / "evaluation.json").read_text())
    assert content["student"]["num_photos"] == content["teacher"]["num_photos"] == 4
    assert content["cosine"] == done.cosine
    assert len(content["cka"]) == len(content["cka"][0]) == 2
    record = json.loads((done.folder / "run.json").read_text())
    assert (record["num_steps"], record["recipe"]["batch_size"]) == (4, 8)
    assert [row.step for row in done.history.training] == [1, 2, 3, 4]
    assert [row.step for row in done.history.evaluations] == [2, 4]
    assert done.history.evaluations[-1].validation_loss == pytest.approx(1 - done.cosine, abs=1e-5)
    loaded = AutoModel.from_pretrained(done.model_folder).eval()
    ours = done.model.state_dict()
    assert loaded.state_dict().keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())
    assert "mean cosine" in done.report.read_text()


def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    write_bert(tmp_path)
    write_text(tmp_path)
    before = adapt_sentence_encoder(toy_run(tmp_path, texts=8, learning_rate=1e-9), device="cpu").cosine
    after = adapt_sentence_encoder(toy_run(tmp_path, texts=240, output=str(tmp_path / "more")), device="cpu").cosine
    assert before is not None
    assert after is not None
    assert 1 - after < 0.8 * (1 - before)


def test_resuming_is_exact(tmp_path: Path) -> None:
    write_bert(tmp_path)
    write_text(tmp_path)
    run = toy_run(tmp_path, save_every=2, gradient_accumulation=2)
    exact = adapt_sentence_encoder(run, device="cpu")
    copy = tmp_path / "copy"
    shutil.copytree(run.output, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "1-student" / "checkpoint-4")
    resumed = adapt_sentence_encoder(replace(run, output=str(copy)), resume=True, device="cpu")
    wanted, found = exact.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert [row.loss for row in resumed.history.training] == [row.loss for row in exact.history.training]
    finished = adapt_sentence_encoder(replace(run, output=str(copy)), resume=True, device="cpu")  # nothing is left
    assert all(torch.equal(finished.model.state_dict()[name], tensor) for name, tensor in wanted.items())
    with pytest.raises(RecipeError, match="texts was 32 and is 40"):
        adapt_sentence_encoder(replace(run, output=str(copy), texts=40), resume=True, device="cpu")


def test_stored_sentences_are_trained_on(tmp_path: Path) -> None:
    write_bert(tmp_path)
    texts = write_text(tmp_path, 60).read_text().split("\n\n")
    make_sentences(texts, letter_tokenizer(), max_length=36).save(tmp_path / "stored")
    run = toy_run(tmp_path)
    run = replace(run, text=replace(run.text, source=str(tmp_path / "stored")))
    done = adapt_sentence_encoder(run, device="cpu")
    stored = len(SentenceDataset.load(tmp_path / "stored"))
    record = json.loads((done.folder / "run.json").read_text())
    assert record["training_texts"] + record["validation_texts"] == stored
    with pytest.raises(RecipeError, match=r"set\s+max_length="):
        adapt_sentence_encoder(replace(run, max_length=8, output=str(tmp_path / "other")), device="cpu")


def test_a_smaller_student_learns_what_is_like_what(tmp_path: Path) -> None:
    write_bert(tmp_path)
    write_text(tmp_path)
    small = EncoderSettings(hidden_size=16, num_hidden_layers=1, num_positions=1, direction_weights="separate")
    run = toy_run(tmp_path, model=small, captions=str(write_captions(tmp_path)))
    with pytest.raises(RecipeError, match=r"set loss\.beta=0 and loss\.similarity=1"):
        adapt_sentence_encoder(run, device="cpu")
    done = adapt_sentence_encoder(replace(run, loss=SentenceLoss(beta=0.0, similarity=1.0)), device="cpu")
    assert done.cosine is None
    assert done.model.config.num_heads == 2
    assert done.student_score is not None


def test_the_result_embeds_texts_of_any_length(tmp_path: Path) -> None:
    write_bert(tmp_path)
    write_text(tmp_path)
    done = adapt_sentence_encoder(toy_run(tmp_path), device="cpu")
    model, tokenizer = load_text_encoder(done.model_folder)
    long = "a dog and a tree " * 30  # 360 tokens; the teacher reads 40
    both = embed_texts(model, tokenizer, ["a cat", long, "a dog"])
    assert len(tokenizer(long)["input_ids"]) == 362
    for text, row in zip(["a cat", long, "a dog"], both, strict=True):
        alone = embed_texts(model, tokenizer, [text])[0]
        assert torch.allclose(alone, row, atol=1e-5)
    assert torch.allclose(both.norm(dim=-1), torch.ones(3))
    modules = json.loads((done.model_folder / "modules.json").read_text())
    assert [one["path"] for one in modules] == ["", "1_Pooling", "2_Normalize"]


def test_sentence_transformers_loads_the_result(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    write_bert(tmp_path)
    write_text(tmp_path)
    done = adapt_sentence_encoder(toy_run(tmp_path), device="cpu")
    texts = ["a cat", "a dog and a tree " * 30]
    found = library.SentenceTransformer(str(done.model_folder), device="cpu").encode(texts)
    assert torch.allclose(torch.tensor(found), embed_texts(done.model, done.tokenizer, texts), atol=1e-6)


def test_a_dry_run_is_the_table(tmp_path: Path) -> None:
    write_bert(tmp_path)
    write_text(tmp_path)
    plan = plan_sentence_adaptation(toy_run(tmp_path))
    assert "(bert) -> bimamba2, ranking magnitude" in str(plan)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match="begins with a new student"):
        plan_sentence_adaptation(toy_run(tmp_path, "new_student"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": ""}, RecipeError, "teacher is not given"),
        ({"teacher": "nowhere/at/all"}, CheckpointError, "There is no nowhere/at/all"),
        ({"max_length": 64}, RecipeError, "max_length=64 is more than the 40 tokens"),
        ({"batch_size": 200, "texts": 400}, RecipeError, "batch_size=200 texts are more than the"),
        ({"captions": "none.jsonl"}, CorpusError, "none.jsonl cannot be read as captions"),
        ({"model": EncoderSettings(hidden_size=20)}, RecipeError, "no multiple of the teacher's head_dim=8"),
        ({"model": EncoderSettings(num_hidden_layers=3)}, InputError, "no multiple of the teacher's 2"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, changes: dict[str, Any], error: type[TransMambaError], message: str
) -> None:
    write_bert(tmp_path)
    write_text(tmp_path)
    with pytest.raises(error, match=message) as caught:
        adapt_sentence_encoder(toy_run(tmp_path, **changes), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "vim_tiny"}, "student='vim_tiny' is unknown"),
        ({"texts": 4}, "texts=4 do not fill one batch of 8"),
        ({"warmup_share": 1.0}, "warmup_share=1.0 must be at least 0 and below 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
    ],
)
def test_bad_runs_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        toy_run(tmp_path, **changes)
    with pytest.raises(RecipeError, match="calibration_texts=-1"):
        EncoderSubcloning(calibration_texts=-1)


def test_an_encoder_of_another_family_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="of the family 'llama'; a sentence encoder is a bert or bimamba2"):
        load_text_encoder(tmp_path / "llama")
    BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
        tmp_path / "bare"
    )
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_text_encoder(tmp_path / "bare")
