"""The quickstart of images: a small ViT learns handwritten digits, and a Mamba is made out of it with few of them.

With the functions that a user would call: `train_image_teacher` and `adapt_images`. The same student also learns from
scratch and from reused weights alone, from the same images in as many steps. A folder of it holds
    report.html     the page to look at; report.json its numbers
    teacher/        the run of the Transformer, a DeiT of transformers
    from_scratch/, weight_reuse/, adapt/   the runs of the students, each with a page of its own
"""

import json
import platform
import shlex
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from transmamba._version import __version__
from transmamba.data import Augmentation, ImageData, ImageSource, load_images
from transmamba.progress import without_progress_bars
from transmamba.recipes.adapt_images import AdaptedModel, adapt_images, train_image_teacher
from transmamba.recipes.adaptation import AdaptationRun, TeacherTraining
from transmamba.recipes.run_folder import EVALUATION_FILE, claim_folder
from transmamba.recipes.table import find_adaptation
from transmamba.report import ClassifierRow, VisionQuickstartReport

__all__ = ["VisionQuickstartSize", "run_vision_quickstart", "vision_student", "vision_teacher"]

MARKER = ".transmamba-vision-quickstart"
# Recipe: what it is called in the table.
STUDENTS = {"from_scratch": "from scratch", "weight_reuse": "weights reused", "adapt": "adapted"}


@dataclass(frozen=True, kw_only=True)
class VisionQuickstartSize:
    """How much it does. Epochs are over the images of each; train_share: of the teacher's images, for the students."""

    teacher_epochs: int
    student_epochs: int
    train_share: float
    image_size: int = 16
    patch_size: int = 4
    hidden_size: int = 32
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    student: str = "plain_mamba_tiny"


FULL = VisionQuickstartSize(teacher_epochs=60, student_epochs=40, train_share=0.1)
# Every step of it, for tests: the numbers mean nothing.
SMOKE = VisionQuickstartSize(teacher_epochs=2, student_epochs=2, train_share=0.05, hidden_size=16, num_hidden_layers=2)


def run_vision_quickstart(
    output: Path, *, size: VisionQuickstartSize = FULL, seed: int = 0, device: str = "cpu"
) -> VisionQuickstartReport:
    """Train a teacher and three students and compare them; write everything into `output`, which must be new or an
    earlier quickstart's (then replaced).

    Two runs with one seed on one CPU give the same scores.

    Raises:
        RecipeError: the folder holds something else.
    """
    began = time.monotonic()
    claim_folder(output, MARKER)
    source = ImageSource(image_size=size.image_size, validation_share=0.5)
    images = load_images(source)
    few = replace(source, train_share=size.train_share)
    fewer = load_images(few)
    with without_progress_bars():
        run = vision_teacher(size, source, seed=seed, output=str(output / "teacher"))
        mark = time.monotonic()
        teacher, score = train_image_teacher(run, device=device, data=images)
        first = ClassifierRow(
            name="Transformer",
            top_1=score.top_1,
            top_5=score.top_5,
            loss=score.loss,
            num_parameters=sum(parameter.numel() for parameter in teacher.parameters()),
            from_teacher=0.0,
            num_images=len(images.train),
            seconds=time.monotonic() - mark,
        )
        done = [
            adapt_images(
                vision_student(
                    size,
                    few,
                    recipe,
                    teacher=str(output / "teacher" / "teacher"),
                    seed=seed,
                    output=str(output / recipe),
                ),
                device=device,
                data=fewer,
            )
            for recipe in STUDENTS
        ]
    adapted = done[-1]
    report = VisionQuickstartReport(
        teacher=first,
        students=tuple(_row(one, name, fewer) for one, name in zip(done, STUDENTS.values(), strict=True)),
        num_images=score.num_images,
        classes=images.classes,
        confusion=adapted.student_score.confusion,
        cka=tuple(map(tuple, json.loads((adapted.folder / EVALUATION_FILE).read_text(encoding="utf-8"))["cka"])),
        settings=_settings(size, adapted.run),
        versions={
            "transmamba": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
            "machine": f"{platform.machine()}, {device}, {torch.get_num_threads()} threads",
        },
        seed=seed,
        command=shlex.join(["transmamba", *sys.argv[1:]]),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seconds=time.monotonic() - began,
    )
    report.write_json(output / "report.json")
    report.write_html(output / "report.html")
    return report


def vision_teacher(size: VisionQuickstartSize, source: ImageSource, *, seed: int, output: str) -> AdaptationRun:
    """The run that trains the Transformer."""
    training = TeacherTraining(
        epochs=size.teacher_epochs,
        learning_rate=3e-3,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        patch_size=size.patch_size,
    )
    return replace(_base("adapt", source, seed, output), teacher="new", teacher_training=training, batch_size=50)


def vision_student(
    size: VisionQuickstartSize, source: ImageSource, recipe: str, *, teacher: str, seed: int, output: str
) -> AdaptationRun:
    """The run that trains a student by a recipe."""
    return replace(
        _base(recipe, source, seed, output),
        teacher=teacher,
        student=size.student,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_hidden_layers,
        epochs=size.student_epochs,
        learning_rate=3e-3,
        batch_size=20,
    )


def _base(recipe: str, source: ImageSource, seed: int, output: str) -> AdaptationRun:
    """What all runs share: digits are not mirrored, and are too small to be mixed."""
    return replace(
        find_adaptation(recipe)(),
        images=source,
        augmentation=Augmentation(crop_padding=1, label_smoothing=0.1),
        keep_checkpoints=1,
        dtype="float32",
        seed=seed,
        output=output,
    )


def _row(done: AdaptedModel, name: str, images: ImageData) -> ClassifierRow:
    score = done.student_score
    return ClassifierRow(
        name=name,
        top_1=score.top_1,
        top_5=score.top_5,
        loss=score.loss,
        num_parameters=sum(parameter.numel() for parameter in done.model.parameters()),
        from_teacher=0.0 if done.plan is None else done.plan.share_from_teacher,
        num_images=len(images.train),
        seconds=done.history.seconds,
        curve=tuple((row.step, row.metrics["task_loss"]) for row in done.history.training),
    )


def _settings(size: VisionQuickstartSize, adapted: AdaptationRun) -> dict[str, str]:
    loss = adapted.loss
    patches = (size.image_size // size.patch_size) ** 2
    return {
        "images": f"scikit-learn's handwritten digits at {size.image_size} pixels, {patches} patches; half of them for "
        "validation",
        "teacher": f"DeiT, {size.num_hidden_layers} layers of width {size.hidden_size}, "
        f"{size.num_attention_heads} heads",
        "student": f"{size.student}, {size.num_hidden_layers} layers of width {size.hidden_size}; "
        f"{size.student_epochs} epochs, batches of {adapted.batch_size}, learning rate {adapted.learning_rate:g}",
        "adapted": f"subcloning by {adapted.subcloning.ranking}; {loss.alpha:g} x features ({loss.features}), "
        f"{loss.beta:g} x labels, {loss.logit_weight:g} x the teacher's logits",
    }
