"""Adaptations: every recipe is carried out, goes on where it was, and says in one line what does not fit."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerCallback

from tests.recipes.adaptations import toy_adaptation, write_teacher
from transmamba.data import Augmentation, ImageSource, load_images
from transmamba.distillation import VisionTeacher
from transmamba.errors import CheckpointError, CorpusError, InputError, RecipeError, TransMambaError
from transmamba.recipes import (
    ADAPTATIONS,
    AdaptationRun,
    TeacherTraining,
    adapt_images,
    find_adaptation,
    plan_adaptation,
    with_fields,
)
from transmamba.report import html


@pytest.fixture(autouse=True)
def drawn_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes longer than the runs; tests/report draws them."""
    monkeypatch.setattr(html, "_svg", lambda figure: b"<svg/>")


adapt_module = importlib.import_module("transmamba.recipes.adapt_images")  # of which the function has the name

FILES = {"1-student", "evaluation.json", "model", "report.html", "run.json"}


@pytest.mark.parametrize("recipe", ADAPTATIONS)
def test_every_recipe_leaves_a_student_and_its_scores(tmp_path: Path, recipe: str) -> None:
    write_teacher(tmp_path)
    done = adapt_images(toy_adaptation(tmp_path, recipe), device="cpu")
    subcloned = done.run.subcloning.use
    assert {path.name for path in done.folder.iterdir()} == FILES | ({"subcloning.json"} if subcloned else set())
    content = json.loads((done.folder / "evaluation.json").read_text())
    assert content["student"]["num_images"] == 359
    assert content["student"]["top_1"] <= content["student"]["top_5"]
    assert sum(map(sum, content["student"]["confusion"])) == 359
    assert len(content["cka"]) == len(content["cka"][0]) == 2
    record = json.loads((done.folder / "run.json").read_text())
    assert record["recipe"]["method"] == done.run.method
    assert (record["num_steps"], record["training_images"]) == (4, 69)
    loaded = AutoModelForImageClassification.from_pretrained(done.model_folder).eval()
    ours = done.model.state_dict()
    assert loaded.state_dict().keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.state_dict().items())
    x = torch.randn(1, 3, 8, 8)
    assert torch.allclose(loaded(x).logits, done.model(x).logits, rtol=1e-5)
    assert loaded.config.id2label[3] == "3"
    assert not [name for name in loaded.state_dict() if "projection" in name or "latent" in name]
    assert [row.step for row in done.history.training] == [1, 2, 3, 4]
    weights = {name for name in done.history.training[0].metrics if name.startswith("weight_")}
    assert weights == ({"weight_0", "weight_1"} if done.run.method == "adaption" else set())
    assert "points" in (done.folder / "report.html").read_text()


@pytest.mark.parametrize("average_decay", [None, 0.9], ids=["last weights", "averaged"])
def test_resuming_is_exact(tmp_path: Path, average_decay: float | None) -> None:
    write_teacher(tmp_path)
    run = toy_adaptation(tmp_path, save_every=2, keep_checkpoints=5, eval_every=2, average_decay=average_decay)
    exact = adapt_images(run, device="cpu")
    copy = tmp_path / "copy"
    shutil.copytree(exact.folder, copy)
    for left in ("1-student/checkpoint-4", "model"):
        shutil.rmtree(copy / left)
    resumed = adapt_images(replace(run, output=str(copy)), resume=True, device="cpu")
    wanted, found = exact.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [row.loss for row in resumed.history.training] == [row.loss for row in exact.history.training]
    if average_decay is None:
        assert [row.validation_accuracy for row in exact.history.evaluations][-1] == exact.student_score.top_1
    else:
        last = load_file(exact.folder / "1-student" / "checkpoint-4" / "model.safetensors")
        assert not torch.equal(last["classifier.weight"], wanted["classifier.weight"])
        assert torch.equal(last["training_parts.average.classifier__weight"], wanted["classifier.weight"])
    finished = adapt_images(replace(run, output=str(copy)), resume=True, device="cpu")  # nothing is left to train
    assert finished.student_score == exact.student_score
    with pytest.raises(RecipeError, match="holds another run: epochs was 2 and is 3"):
        adapt_images(replace(run, output=str(copy), epochs=3), resume=True, device="cpu")


def test_another_seed_is_another_student(tmp_path: Path) -> None:
    write_teacher(tmp_path)
    first, second = (
        adapt_images(toy_adaptation(tmp_path, output=str(tmp_path / str(seed)), seed=seed, epochs=1), device="cpu")
        for seed in (0, 1)
    )
    name = "backbone.layers.0.mixer.x_proj.weight"
    assert not torch.equal(first.model.state_dict()[name], second.model.state_dict()[name])


def test_accumulating_changes_nothing_but_rounding(tmp_path: Path) -> None:
    write_teacher(tmp_path)
    quiet = {"augmentation": Augmentation(), "epochs": 1, "method": "soft_logits"}
    whole, parts = (
        adapt_images(
            toy_adaptation(tmp_path, output=str(tmp_path / name), gradient_accumulation=n, **quiet), device="cpu"
        )
        for name, n in (("whole", 1), ("parts", 4))
    )
    for one, other in zip(whole.history.training, parts.history.training, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3)


def test_bf16_computes_student_teacher_and_projections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_teacher(tmp_path)
    seen: set[torch.dtype] = set()
    whole = VisionTeacher.__call__

    def watched(self: VisionTeacher, *arguments: Any, **named: Any) -> Any:
        signals = whole(self, *arguments, **named)
        seen.add(signals.logits.dtype)
        return signals

    monkeypatch.setattr(VisionTeacher, "__call__", watched)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        seen.clear()
        run = toy_adaptation(tmp_path, dtype=dtype, augmentation=Augmentation(), output=str(tmp_path / dtype))
        done = adapt_images(run, device="cpu")
        # In the feature loss; the alignment at the end is measured in fp32.
        assert seen == {torch.float32} | ({torch.bfloat16} if dtype == "bfloat16" else set())
        assert all(parameter.dtype == torch.float32 for parameter in done.model.parameters())
        losses[dtype] = [row.loss for row in done.history.training]
    # A rounding of 2^-9 relative in each of some ten products on the way, and in four steps.
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=4 * 10**0.5 * 2**-9)
    assert losses["bfloat16"] != losses["float32"]


def test_projections_have_a_rate_of_their_own(tmp_path: Path) -> None:
    write_teacher(tmp_path)
    seen = []

    def remember(run: AdaptationRun) -> None:
        groups: list[dict[str, Any]] = []
        wanted = {"learning_rate": run.learning_rate}

        class Watch(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
                groups.extend(optimizer.param_groups)

        original = adapt_module.fit
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                adapt_module,
                "fit",
                lambda *a, callbacks=(), **k: original(*a, callbacks=[*callbacks, Watch()], **k),
            )
            adapt_images(run, device="cpu")
        seen.append(sorted({group["initial_lr"] / wanted["learning_rate"] for group in groups}))

    remember(toy_adaptation(tmp_path, epochs=1))
    remember(toy_adaptation(tmp_path, epochs=1, projection_rate=8.0, layer_decay=0.5, output=str(tmp_path / "other")))
    assert seen[0] == [1.0]
    assert seen[1] == pytest.approx([0.125, 0.25, 0.5, 1.0, 8.0])


def test_mixed_labels_count_as_one_an_image(tmp_path: Path) -> None:
    """The Trainer counts class numbers; with probabilities the loss must not become smaller by the classes."""
    write_teacher(tmp_path)
    done = adapt_images(toy_adaptation(tmp_path, "from_scratch", epochs=1), device="cpu")
    first = done.history.training[0]
    assert first.loss == pytest.approx(first.metrics["task_loss"], rel=1e-5)
    assert 1.5 < first.loss < 4  # about log(10) at first


def test_a_new_teacher_is_trained_first_and_kept(tmp_path: Path) -> None:
    training = TeacherTraining(
        epochs=3, learning_rate=5e-3, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, patch_size=4
    )
    run = toy_adaptation(
        tmp_path,
        teacher="new",
        teacher_training=training,
        augmentation=Augmentation(),
        images=ImageSource(image_size=8, train_share=0.3),
    )
    done = adapt_images(run, device="cpu")
    assert {"0-teacher", "teacher"} <= {path.name for path in done.folder.iterdir()}
    losses = [
        json.loads(line)["loss"] for line in (done.folder / "0-teacher" / "history.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 3 * (len(load_images(run.images).train) // 32)
    assert losses[-1] < losses[0]
    kept = load_file(done.folder / "teacher" / "model.safetensors")
    shutil.rmtree(done.folder / "model")
    adapt_images(run, resume=True, device="cpu")
    again = load_file(done.folder / "teacher" / "model.safetensors")
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_teacher_of_other_classes_is_fine_tuned_with_a_new_head(tmp_path: Path) -> None:
    write_teacher(tmp_path, num_labels=3)
    run = toy_adaptation(tmp_path, epochs=1)
    with pytest.raises(RecipeError, match="the teacher has 3 classes and builtin:digits has 10; set teacher_training"):
        adapt_images(run, device="cpu")
    done = adapt_images(replace(run, teacher_training=TeacherTraining(epochs=1)), device="cpu")
    assert len(done.teacher_score.confusion) == 10


def test_the_student_begins_as_the_table_says(tmp_path: Path) -> None:
    write_teacher(tmp_path)
    run = toy_adaptation(tmp_path, epochs=1)
    planned = plan_adaptation(run)
    done = adapt_images(run, device="cpu")
    assert done.plan is not None
    assert done.plan.rows == planned.rows
    assert json.loads((done.folder / "subcloning.json").read_text())["ranking"] == "magnitude"
    changed = with_fields(run, {"subcloning.depth_map": "1,-1", "subcloning.ranking": "activation"})
    assert plan_adaptation(changed).depth_map == (1, None)
    assert AdaptationRun.from_json(changed.to_json()) == changed
    with pytest.raises(RecipeError, match="from_scratch begins with a new student"):
        plan_adaptation(toy_adaptation(tmp_path, "from_scratch"))


def test_adapting_digits_beats_guessing(tmp_path: Path) -> None:
    write_teacher(tmp_path)
    run = toy_adaptation(
        tmp_path,
        "weight_reuse",
        images=ImageSource(image_size=8),
        augmentation=Augmentation(),
        epochs=3,
        learning_rate=1e-2,
    )
    done = adapt_images(run, device="cpu")
    assert done.student_score.top_1 > 0.5  # a guess is right once in ten


def test_runs_are_json_and_back() -> None:
    for name in ADAPTATIONS:
        run = find_adaptation(name)()
        assert run.name == name
        assert run.output == f"runs/{name}"
        assert AdaptationRun.from_json(json.loads(json.dumps(run.to_json()))) == run


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"teacher": ""}, RecipeError, "teacher is not given; name a ViT or DeiT with --teacher"),
        ({"teacher": "new"}, RecipeError, "teacher='new' has to be trained; set teacher_training.epochs"),
        ({"images": ImageSource(image_size=16)}, RecipeError, "reads images of 8 pixels and images.image_size is 16"),
        ({"batch_size": 128}, RecipeError, "batch_size=128 images are more than the 69"),
        ({"hidden_size": 24}, InputError, "the student is wider than its teacher: 24 of residual"),
        (
            {"student": "vmamba_tiny", "hidden_size": None, "num_hidden_layers": None},
            InputError,
            "the student has 14 blocks, which is no multiple of the teacher's 2|wider than its teacher",
        ),
        ({"images": ImageSource(source="nowhere", image_size=8)}, CorpusError, "nowhere is no folder"),
        ({"method": "final_feature", "hidden_size": 8}, InputError, "the student is 8 wide and the teacher 12"),
        ({"method": "bridging", "patch_size": 2}, InputError, "the student has 16 patches and the teacher 2 x 2"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:20],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, changes: dict[str, Any], kind: type[TransMambaError], message: str
) -> None:
    write_teacher(tmp_path)
    with pytest.raises(TransMambaError, match=message) as caught:
        adapt_images(toy_adaptation(tmp_path, **changes), device="cpu")
    assert isinstance(caught.value, kind)
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_teacher_is_refused(tmp_path: Path) -> None:
    write_teacher(tmp_path)
    done = adapt_images(toy_adaptation(tmp_path, epochs=1), device="cpu")
    run = toy_adaptation(tmp_path, teacher=str(done.model_folder), output=str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="of the family 'vim'; a teacher of images is a vit or deit"):
        adapt_images(run, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method='magic' is unknown; choose one of adaption, task"),
        ({"student": "vit_tiny"}, "student='vit_tiny' is unknown; choose one of plain_mamba_tiny"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"warmup_share": 1.0}, r"warmup_share=1\.0 must be at least 0"),
        ({"average_decay": 1.0}, r"average_decay=1\.0 must be above 0 and below 1"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
        ({"std": (1.0, 0.0, 1.0)}, "those of std above 0"),
        ({"student": "vmamba_tiny"}, "has widths and depths of stages"),
    ],
)
def test_a_run_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        toy_adaptation(tmp_path, **changes)


def test_teachers_of_impossible_sizes_are_refused() -> None:
    with pytest.raises(RecipeError, match="num_attention_heads=5 must divide hidden_size=12"):
        TeacherTraining(hidden_size=12, num_attention_heads=5)
    with pytest.raises(RecipeError, match="epochs=-1"):
        TeacherTraining(epochs=-1)
