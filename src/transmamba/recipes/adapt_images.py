"""Carrying out an adaptation.

A run's folder holds
    run.json            the run as it was carried out, with versions, sizes and the command
    teacher/            the teacher as it was fine-tuned, if it was; 0-teacher/ its training
    subcloning.json     where every parameter of the student came from, if it was subcloned
    1-student/          the training, with its history.jsonl, tensorboard/ and checkpoint-*/
    model/              the student
    evaluation.json     top-1, top-5, loss and confusion matrix of student and teacher, and the alignment of layers
    report.html         all of it as a page
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)

from transmamba.conversion import SubcloningPlan, plan_subcloning, subclone
from transmamba.data import ImageData, ImageDataset, as_floats, augment, load_images
from transmamba.distillation import (
    AdaptionObjective,
    BridgingObjective,
    FinalFeatureObjective,
    MixingObjective,
    SoftLogitObjective,
    TaskObjective,
    VisionTeacher,
    attached,
    make_bridges,
    make_projections,
)
from transmamba.distillation.projections import ATTRIBUTE
from transmamba.errors import CheckpointError, RecipeError
from transmamba.inference import resolve_device
from transmamba.models import VISION_PRESETS, VisionMambaClassifier, vision_config, vision_model_of
from transmamba.progress import without_progress_bars
from transmamba.recipes.adaptation import NEW_TEACHER, AdaptationRun
from transmamba.recipes.distil import load_weights
from transmamba.recipes.fit import StageFolder, fit
from transmamba.recipes.run_folder import (
    EVALUATION_FILE,
    MODEL_FOLDER,
    RUN_FILE,
    check_folder,
    provenance,
    save_model,
)
from transmamba.recipes.training_run import is_main_process
from transmamba.report import AdaptionReport
from transmamba.tasks import ClassificationScore, ImageBatch, evaluate_classifier, linear_cka
from transmamba.training import (
    KeepAverage,
    LossFunction,
    TrainingHistory,
    WeightAverage,
    layer_rates,
)
from transmamba.training.checkpoints import write_atomically
from transmamba.weights import find_folder, in_one_line, read_json

__all__ = ["AdaptedModel", "adapt_images", "plan_adaptation", "train_image_teacher"]

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = frozenset({"output", "log_every", "eval_every", "save_every", "keep_checkpoints", "cka_images"})
TEACHER_FOLDER, SUBCLONING_FILE, REPORT_FILE = "teacher", "subcloning.json", "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedModel:
    """What an adaptation leaves: the student, on the device it was trained on, its scores, and where everything is."""

    run: AdaptationRun
    folder: Path
    model: VisionMambaClassifier
    history: TrainingHistory
    plan: SubcloningPlan | None
    student_score: ClassificationScore
    teacher_score: ClassificationScore

    @property
    def model_folder(self) -> Path:
        return self.folder / MODEL_FOLDER

    @property
    def report(self) -> Path:
        return self.folder / REPORT_FILE


def adapt_images(
    run: AdaptationRun,
    *,
    resume: bool = False,
    device: str = "auto",
    data: ImageData | None = None,
    report: bool = True,
) -> AdaptedModel:
    """Carry out an adaptation in its output folder, or go on with the one that is in it.

    resume: the folder must hold this run; without it, it must be empty or absent. Resuming on the CPU gives the same
    losses and weights, bit for bit, as a run that was never interrupted. data: what `load_images` gives for the run's
    images, where it is at hand. report: write report.html.

    Raises:
        RecipeError: the run contradicts itself, the images or the folder, or the loss is not finite.
        InputError: teacher and student do not fit each other.
        CheckpointError: the teacher cannot be read, or a checkpoint cannot be written.
        CorpusError: the images cannot be read or are too few.
    """
    chosen = resolve_device(device)
    run = _at_the_teachers_size(run)
    folder = Path(run.output)
    if is_main_process():
        check_folder(run, resume, FREE_TO_CHANGE)
    data = data or load_images(run.images)
    if len(data.train) < run.batch_size:
        raise RecipeError(
            f"batch_size={run.batch_size} images are more than the {len(data.train)} that {run.images.source} gives "
            "for training; use a smaller batch_size, or more images."
        )
    torch.manual_seed(run.seed)
    teacher = _open_teacher(run, data, folder if resume else None)
    _check_teacher(run, teacher, data)
    config = _student_config(run, data, int(teacher.config.patch_size))
    _check_fits(run, teacher, config, data)
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RUN_FILE, json.dumps(_record(run, data, config, chosen.type), indent=2) + "\n")
    teacher = _train_teacher(run, teacher, data, folder, chosen, resume=resume).to(chosen)
    set_seed(run.seed)
    student, plan = _begin_student(run, teacher, config, data)
    if plan is not None and is_main_process():
        write_atomically(folder / SUBCLONING_FILE, plan.to_json())
    frozen = VisionTeacher(teacher)
    student.to(chosen)
    objective, parts = _objective(run, student, frozen, data)
    images = _Images(run, objective, len(data.classes))
    data = _near(data, chosen)
    average = None if run.average_decay is None else WeightAverage(student, run.average_decay)
    with attached(student, parts if average is None else nn.ModuleDict({"parts": parts, "average": average})):
        history = _train(
            run,
            student,
            data,
            folder / "1-student",
            chosen,
            images,
            run.epochs,
            run.learning_rate,
            run.layer_decay,
            resume=resume,
            callbacks=[] if average is None else [KeepAverage(student, average)],
        )
    if average is not None:
        average.copy_to(student)
    batches = _Batches(run, data.validation, run.micro_batch)
    student_score, teacher_score = evaluate_classifier(student, batches), evaluate_classifier(teacher, batches)
    done = AdaptedModel(
        run=run,
        folder=folder,
        model=student,
        history=history,
        plan=plan,
        student_score=student_score,
        teacher_score=teacher_score,
    )
    if is_main_process():
        student.config.id2label = dict(enumerate(data.classes))
        student.config.label2id = {name: number for number, name in enumerate(data.classes)}
        save_model(student, None, folder / MODEL_FOLDER)
        _write_results(done, data, _alignment(run, student, frozen, data.validation), report)
    return done


def train_image_teacher(
    run: AdaptationRun, *, resume: bool = False, device: str = "auto", data: ImageData | None = None
) -> tuple[PreTrainedModel, ClassificationScore]:
    """Only the first part of an adaptation: train or fine-tune its teacher, in `teacher/` of its output folder.

    Returns the teacher and its score on the validation images. Arguments and errors are those of `adapt_images`.
    """
    chosen = resolve_device(device)
    run = _at_the_teachers_size(run)
    folder = Path(run.output)
    if not run.teacher_training.epochs:
        raise RecipeError("teacher_training.epochs=0 trains no teacher; set it to 100 or so.")
    if is_main_process():
        check_folder(run, resume, FREE_TO_CHANGE)
    data = data or load_images(run.images)
    torch.manual_seed(run.seed)
    teacher = _open_teacher(run, data, folder if resume else None)
    _check_teacher(run, teacher, data)
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        record = {"recipe": run.to_json(), "classes": list(data.classes), **provenance(chosen.type)}
        write_atomically(folder / RUN_FILE, json.dumps(record, indent=2) + "\n")
    teacher = _train_teacher(run, teacher, data, folder, chosen, resume=resume).to(chosen).eval()
    return teacher, evaluate_classifier(teacher, _Batches(run, data.validation, run.micro_batch))


def plan_adaptation(run: AdaptationRun) -> SubcloningPlan:
    """The table of a run's subcloning, without carrying anything out; of a teacher that is new, with initial values.

    Raises:
        RecipeError: the run begins with a new student.
    """
    if not run.subcloning.use:
        raise RecipeError(f"{run.name} begins with a new student, so there is no table; set subcloning.use=true.")
    run = _at_the_teachers_size(run)
    data = load_images(run.images)
    torch.manual_seed(run.seed)
    teacher = _open_teacher(run, data, None)
    _check_teacher(run, teacher, data)
    config = _student_config(run, data, int(teacher.config.patch_size))
    return plan_subcloning(teacher, config, **_subcloning_arguments(run, data))


class _Images:
    """A loss function of the Trainer: augments and normalises a batch of uint8 images and hands it to an objective."""

    def __init__(self, run: AdaptationRun, objective: LossFunction, classes: int) -> None:
        self.run = run
        self.objective = objective
        self.classes = classes

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        # The Trainer calls losses in the run's precision; images keep theirs until they reach a model.
        with torch.autocast(batch["pixel_values"].device.type, enabled=False):
            x, labels = augment(batch["pixel_values"], batch["labels"], self.classes, self.run.augmentation)
            x = _normalised(self.run, x)
        whole = batch.get("num_items_in_batch")
        # The Trainer counts class numbers, one an image; probabilities are as many as there are classes.
        scale = self.classes if whole is not None and labels.is_floating_point() else 1
        prepared = {
            "pixel_values": x,
            "labels": labels,
            "num_items_in_batch": None if whole is None else whole * scale,
        }
        return self.objective(model, prepared)


class _Batches:
    """The images of a data set, normalised, in order; can be gone through several times."""

    def __init__(self, run: AdaptationRun, images: ImageDataset, size: int) -> None:
        self.run = run
        self.images = images
        self.size = size

    def __iter__(self) -> Iterator[ImageBatch]:
        for start in range(0, len(self.images), self.size):
            rows = slice(start, start + self.size)
            pixels = _normalised(self.run, as_floats(self.images.pixels[rows]))
            yield {"pixel_values": pixels, "labels": self.images.labels[rows]}


def _normalised(run: AdaptationRun, x: Tensor) -> Tensor:
    return (x - _channels(run.mean, x.device)) / _channels(run.std, x.device)


@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(channels, 1, 1); kept, since sending numbers to a GPU waits for what is queued there."""
    return torch.tensor(values, device=device)[:, None, None]


def _near(data: ImageData, device: torch.device) -> ImageData:
    """The images on the GPU, where they take at most a quarter of its free memory; else as they are."""
    if device.type != "cuda":
        return data
    free, _ = torch.cuda.mem_get_info(device)
    return data.to(device) if 4 * (data.train.num_bytes + data.validation.num_bytes) <= free else data


def _at_the_teachers_size(run: AdaptationRun) -> AdaptationRun:
    """The run with images of the size that its teacher reads, where it does not say which."""
    if run.images.image_size is not None or run.teacher in ("", NEW_TEACHER):
        return run
    size = read_json(find_folder(run.teacher) / "config.json").get("image_size")
    side = size[0] if isinstance(size, list) and size else size
    return replace(run, images=replace(run.images, image_size=side)) if isinstance(side, int) else run


def _open_teacher(run: AdaptationRun, data: ImageData, resumed: Path | None) -> PreTrainedModel:
    """The teacher as it is, with a new head of the images' classes where it is fine-tuned, in fp32."""
    training, classes = run.teacher_training, len(data.classes)
    if not run.teacher:
        raise RecipeError(f"teacher is not given; name a ViT or DeiT with --teacher, or {NEW_TEACHER!r} to train one.")
    if resumed is not None and (resumed / TEACHER_FOLDER).is_dir():
        return _load_teacher(str(resumed / TEACHER_FOLDER), {})
    if run.teacher != NEW_TEACHER:
        return _load_teacher(
            run.teacher, {"num_labels": classes, "ignore_mismatched_sizes": True} if training.epochs else {}
        )
    if not training.epochs:
        raise RecipeError(f"teacher={NEW_TEACHER!r} has to be trained; set teacher_training.epochs, or give a teacher.")
    return DeiTForImageClassification(
        DeiTConfig(
            image_size=run.images.side,
            patch_size=training.patch_size,
            hidden_size=training.hidden_size,
            intermediate_size=4 * training.hidden_size,
            num_hidden_layers=training.num_hidden_layers,
            num_attention_heads=training.num_attention_heads,
            num_labels=classes,
        )
    )


def _load_teacher(name: str, changes: dict[str, Any]) -> PreTrainedModel:
    folder = find_folder(name)
    family = read_json(folder / "config.json").get("model_type")
    if family not in ("vit", "deit"):
        raise CheckpointError(f"{name} is of the family {family!r}; a teacher of images is a vit or deit.")
    try:
        with without_progress_bars():
            return AutoModelForImageClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, **changes
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{name} cannot be read: {in_one_line(error)}") from error


def _check_teacher(run: AdaptationRun, teacher: PreTrainedModel, data: ImageData) -> None:
    size, classes = teacher.config.image_size, len(data.classes)
    if size not in (run.images.side, [run.images.side] * 2):
        raise RecipeError(
            f"the teacher reads images of {size} pixels and images.image_size is {run.images.side}; set "
            f"images.image_size={size if isinstance(size, int) else size[0]}."
        )
    if teacher.config.num_labels != classes:
        raise RecipeError(
            f"the teacher has {teacher.config.num_labels} classes and {run.images.source} has {classes}; set "
            "teacher_training.epochs to fine-tune it with a new head, or give one of these classes."
        )


@torch.no_grad()
def _check_fits(run: AdaptationRun, teacher: PreTrainedModel, config: Any, data: ImageData) -> None:
    """Raise what the method would raise, before any work is done: with a student that is thrown away, on two images."""
    if run.subcloning.use:
        plan_subcloning(teacher, config, **_subcloning_arguments(run, data) | {"ranking": "uniform"})
    student = vision_model_of(config).eval()
    objective, parts = _objective(run, student, VisionTeacher(teacher), data)
    pixels = _normalised(run, as_floats(data.train.pixels[:2]))
    with attached(student, parts):
        objective(student, {"pixel_values": pixels, "labels": data.train.labels[:2]})
    teacher.requires_grad_(True)  # it may have to learn first


def _student_config(run: AdaptationRun, data: ImageData, patch_size: int) -> Any:
    given = {
        "hidden_size": run.hidden_size,
        "num_hidden_layers": run.num_hidden_layers,
        "patch_size": run.patch_size or (None if run.student.startswith("vmamba") else patch_size),
    }
    fields = {name: value for name, value in given.items() if value is not None}
    assert run.student in VISION_PRESETS
    return vision_config(
        run.student,
        image_size=run.images.side,
        num_labels=len(data.classes),
        drop_path_rate=run.drop_path_rate,
        **fields,
    )


def _begin_student(
    run: AdaptationRun, teacher: PreTrainedModel, config: Any, data: ImageData
) -> tuple[VisionMambaClassifier, SubcloningPlan | None]:
    if not run.subcloning.use:
        return vision_model_of(config), None
    student, plan = subclone(teacher, config, **_subcloning_arguments(run, data))
    assert isinstance(student, VisionMambaClassifier)
    return student, plan


def _subcloning_arguments(run: AdaptationRun, data: ImageData) -> dict[str, Any]:
    how = run.subcloning
    return {
        "ranking": how.ranking,
        "pretrained": how.pretrained,
        "calibration": _normalised(run, as_floats(data.train.pixels[: how.calibration_images])),
        "early_layers": how.early_layers,
        "depth_map": how.blocks,
        "rescale": how.rescale,
        "mixer_source": how.mixer_source,
        "gate_source": how.gate_source,
        "convolution": how.convolution,
    }


def _objective(
    run: AdaptationRun, student: VisionMambaClassifier, teacher: VisionTeacher, data: ImageData
) -> tuple[LossFunction, nn.Module]:
    """The method's objective, and what has to be trained beside the student."""
    none = nn.ModuleList()
    one = _normalised(run, as_floats(data.train.pixels[:1])).to(next(student.parameters()).device)
    if run.method == "adaption":
        projections = make_projections(student, teacher, one, run.loss, sharing=run.sharing, padding=run.padding)
        return AdaptionObjective(student, teacher, projections, run.loss), projections
    if run.method == "bridging":
        bridges = make_bridges(student, teacher, one)
        return BridgingObjective(student, teacher, bridges), bridges
    if run.method == "mixing":
        return MixingObjective(student, teacher, temperature=run.temperature), none
    if run.method == "soft_logits":
        return SoftLogitObjective(teacher, temperature=run.temperature), none
    return (FinalFeatureObjective(teacher) if run.method == "final_feature" else TaskObjective()), none


def _train_teacher(
    run: AdaptationRun, teacher: PreTrainedModel, data: ImageData, folder: Path, device: torch.device, *, resume: bool
) -> PreTrainedModel:
    """Fine-tune the teacher, if that is asked for and not done yet."""
    training = run.teacher_training
    if not training.epochs or (folder / TEACHER_FOLDER).is_dir():
        return teacher
    set_seed(run.seed + 1)
    images = _Images(run, TaskObjective(), len(data.classes))
    stage = folder / "0-teacher"
    epochs, rate, decay = training.epochs, training.learning_rate, training.layer_decay
    _train(run, teacher, _near(data, device), stage, device, images, epochs, rate, decay, resume=resume)
    if is_main_process():
        save_model(teacher, None, folder / TEACHER_FOLDER)
    return teacher.eval()


def _train(
    run: AdaptationRun,
    model: PreTrainedModel,
    data: ImageData,
    folder: Path,
    device: torch.device,
    images: _Images,
    epochs: int,
    learning_rate: float,
    layer_decay: float,
    *,
    resume: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingHistory:
    steps = run.steps_of(epochs, len(data.train))
    kept = StageFolder.begin(folder, resume=resume)
    finished = kept.result_of(steps)
    if finished is not None:
        load_weights(model, finished)
        return kept.history
    arguments = run.training_arguments(
        folder,
        device.type,
        num_steps=steps,
        learning_rate=learning_rate,
        warmup_steps=round(run.warmup_share * steps),
        seed=run.seed,
        evaluates=True,
        has_unused_parameters=True,
    )
    arguments.include_num_input_tokens_seen = "no"  # it would count pixels
    arguments.dataloader_pin_memory &= data.train.pixels.device.type == "cpu"
    fit(
        model,
        arguments,
        train=data.train,
        validation=data.validation,
        evaluate_fn=lambda one, dataset: _validate(run, one, dataset),
        tokenizer=None,
        history=kept.history,
        checkpoint=kept.checkpoint,
        description=folder.name,
        keep_checkpoints=run.keep_checkpoints,
        loss_fn=images,
        callbacks=callbacks,
        rates=_rates(run, model, layer_decay),
    )
    return kept.history


def _rates(run: AdaptationRun, model: PreTrainedModel, layer_decay: float) -> dict[str, float]:
    """Shares of the learning rate, of those that do not get all of it."""
    names = [name for name, _ in model.named_parameters()]
    beside = [name for name in names if name.startswith(f"{ATTRIBUTE}.")]
    rates = layer_rates([name for name in names if name not in set(beside)], layer_decay)
    return {name: rate for name, rate in (rates | dict.fromkeys(beside, run.projection_rate)).items() if rate != 1}


def _validate(run: AdaptationRun, model: Any, dataset: ImageDataset) -> dict[str, float]:
    score = evaluate_classifier(model, _Batches(run, dataset, run.micro_batch))
    return {"loss": score.loss, "accuracy": score.top_1}


@torch.no_grad()
def _alignment(
    run: AdaptationRun, student: VisionMambaClassifier, teacher: VisionTeacher, images: ImageDataset
) -> list[list[float]]:
    """CKA of the mean token after every layer of the student (rows) and every block of the teacher (columns)."""
    student.eval()
    device = next(student.parameters()).device
    ours: list[list[Tensor]] = []
    theirs: list[list[Tensor]] = []
    some = ImageDataset(images.pixels[: run.cka_images], images.labels[: run.cka_images])
    for batch in _Batches(run, some, run.micro_batch):
        x = batch["pixel_values"].to(device)
        states = student(x, output_hidden_states=True).hidden_states[1:]
        ours.append([state.mean(1).cpu() for state in states])
        theirs.append([tokens.mean(1).cpu() for tokens in teacher(x).tokens])
    rows, columns = ([torch.cat(layer) for layer in zip(*kept, strict=True)] for kept in (ours, theirs))
    return [[linear_cka(row, column) for column in columns] for row in rows]


def _write_results(done: AdaptedModel, data: ImageData, alignment: list[list[float]], page: bool) -> None:
    content = {
        "student": asdict(done.student_score),
        "teacher": asdict(done.teacher_score),
        "classes": list(data.classes),
        "cka": alignment,
        "skipped": list(data.skipped),
    }
    write_atomically(done.folder / EVALUATION_FILE, json.dumps(content) + "\n")
    if not page:
        return
    report = AdaptionReport(
        name=done.run.name,
        teacher=done.run.teacher,
        student=done.run.student,
        method=done.run.method,
        source=done.run.images.source,
        num_training_images=len(data.train),
        num_parameters=sum(parameter.numel() for parameter in done.model.parameters()),
        share_from_teacher=0.0 if done.plan is None else done.plan.share_from_teacher,
        classes=data.classes,
        student_scores=(done.student_score.top_1, done.student_score.top_5, done.student_score.loss),
        teacher_scores=(done.teacher_score.top_1, done.teacher_score.top_5, done.teacher_score.loss),
        num_images=done.student_score.num_images,
        confusion=done.student_score.confusion,
        cka=alignment,
        steps=[row.step for row in done.history.training],
        losses=[row.loss for row in done.history.training],
        layer_weights=_by_layer(done.history, "weight"),
        layer_cosines=_by_layer(done.history, "cosine"),
        accuracy=[
            (row.step, row.validation_accuracy)
            for row in done.history.evaluations
            if row.validation_accuracy is not None
        ],
        skipped=data.skipped,
    )
    report.page().write(done.report)


def _by_layer(history: TrainingHistory, what: str) -> list[list[float]]:
    """A list for every layer of what was logged at every row; none where the method has no layers."""
    found: list[list[float]] = []
    rows = history.training
    while rows and f"{what}_{len(found)}" in rows[0].metrics:
        found.append([row.metrics[f"{what}_{len(found)}"] for row in rows])
    return found


def _record(run: AdaptationRun, data: ImageData, config: Any, device: str) -> dict[str, Any]:
    return {
        "recipe": run.to_json(),
        "model": config.to_dict(),
        "classes": list(data.classes),
        "training_images": len(data.train),
        "validation_images": len(data.validation),
        "num_steps": run.steps_of(run.epochs, len(data.train)),
        **provenance(device),
    }
