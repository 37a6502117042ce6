"""A whole run that turns a Transformer of images into a Mamba, and the recipes that come with the library.

Every recipe is the same run with another `method` or without subcloning, so that they can be compared: the same data,
batches, steps and student.
"""

import math
from dataclasses import dataclass, field, replace

from transmamba.data import Augmentation, ImageSource
from transmamba.distillation import AdaptionLoss
from transmamba.errors import RecipeError
from transmamba.models import VISION_PRESETS
from transmamba.recipes.training_run import TrainingRun, check_learning_rate
from transmamba.training import layer_rates

__all__ = [
    "METHODS",
    "AdaptationRun",
    "SubcloningSettings",
    "TeacherTraining",
    "adapt",
    "adapt_v1",
    "adapt_v2",
    "bridging",
    "distil_only",
    "from_scratch",
    "mixing",
    "public_release",
    "soft_logits",
    "weight_reuse",
]

METHODS = {
    "adaption": "directions and layers come near the teacher's tokens",
    "task": "the labels alone",
    "soft_logits": "the teacher's logits, and the labels",
    "final_feature": "the loss of the paper's public code",
    "bridging": "B and C come near keys and queries, after CAB",
    "mixing": "mixing matrices come near attention, after MOHAWK",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NEW_TEACHER = "new"


@dataclass(frozen=True, kw_only=True, slots=True)
class SubcloningSettings:
    """How the student begins; see `transmamba.conversion.plan_subcloning`. use: false = as a new model.

    calibration_images: for ranking "activation". pretrained: for "stability". depth_map: for each block of the student
        one of the teacher, from 0; -1 = none, it begins as in a new model.
    """

    use: bool = True
    ranking: str = "magnitude"
    pretrained: str | None = None
    calibration_images: int = 128
    early_layers: int | None = None
    depth_map: tuple[int, ...] | None = None
    rescale: bool = True
    mixer_source: str | None = None
    gate_source: str = "mlp"
    convolution: str = "drawn"

    def __post_init__(self) -> None:
        if self.depth_map is not None:
            object.__setattr__(self, "depth_map", tuple(int(block) for block in self.depth_map))
        if self.calibration_images < 1:
            raise RecipeError(f"calibration_images={self.calibration_images} must be at least 1.")

    @property
    def blocks(self) -> tuple[int | None, ...] | None:
        """depth_map as `plan_subcloning` takes it."""
        return None if self.depth_map is None else tuple(None if block < 0 else block for block in self.depth_map)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherTraining:
    """How the teacher is fine-tuned on the images first. epochs: 0 = it is used as it is.

    layer_decay: see `AdaptationRun`. The sizes are those of a teacher that is new: a DeiT-tiny.
    """

    epochs: int = 0
    learning_rate: float = 5e-4
    layer_decay: float = 1.0
    hidden_size: int = 192
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    patch_size: int = 16

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise RecipeError(f"epochs={self.epochs} must be at least 0.")
        check_learning_rate("learning_rate", self.learning_rate)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.hidden_size % self.num_attention_heads:
            raise RecipeError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptationRun(TrainingRun):
    """Everything that decides what an adapted student is, beside what TrainingRun says. A window is an image here.

    teacher: the folder or Hub name of a ViT or DeiT, or "new" = a DeiT that is trained on the images first.
    student: a name of VISION_PRESETS. hidden_size, num_hidden_layers, patch_size: of the student, where they are not
        those of its name; patch_size None = the teacher's.
    method: a name of METHODS. loss: of "adaption". temperature: of the logits in the other methods.
    sharing, padding: of the projections; see `make_projections`.
    layer_decay: of the learning rate from layer to layer, towards the input; see `layer_rates`. projection_rate: of the
        projections and bridges, times the learning rate.
    epochs: over the training images. warmup_share: of the steps, in which the learning rate rises to its peak.
    average_decay: the student is the average of its weights over steps, with this weight of the past; None = the last.
    mean, std: of the normalisation of red, green and blue, which teacher and student share.
    cka_images: of the validation images, on how many layers of teacher and student are compared.
    """

    teacher: str = ""
    student: str = "plain_mamba_tiny"
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    patch_size: int | None = None
    drop_path_rate: float = 0.0
    images: ImageSource = field(default_factory=ImageSource)
    augmentation: Augmentation = field(default_factory=Augmentation)
    method: str = "adaption"
    loss: AdaptionLoss = field(default_factory=AdaptionLoss)
    subcloning: SubcloningSettings = field(default_factory=SubcloningSettings)
    teacher_training: TeacherTraining = field(default_factory=TeacherTraining)
    sharing: str = "direction"
    padding: bool = True
    temperature: float = 2.0
    epochs: int = 100
    learning_rate: float = 5e-4
    layer_decay: float = 1.0
    projection_rate: float = 1.0
    warmup_share: float = 0.05
    average_decay: float | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    cka_images: int = 256

    def __post_init__(self) -> None:
        self.check_training()
        check_learning_rate("learning_rate", self.learning_rate)
        if self.method not in METHODS:
            raise RecipeError(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}.")
        if self.student not in VISION_PRESETS:
            raise RecipeError(f"student={self.student!r} is unknown; choose one of {', '.join(VISION_PRESETS)}.")
        if self.student.startswith("vmamba") and (self.hidden_size or self.num_hidden_layers or self.patch_size):
            raise RecipeError(
                f"student={self.student!r} has widths and depths of stages; hidden_size, num_hidden_layers and "
                "patch_size are not its own, leave them out."
            )
        for name in ("epochs", "cka_images"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.warmup_share < 1:
            raise RecipeError(f"warmup_share={self.warmup_share} must be at least 0 and below 1.")
        for decay in (self.layer_decay, self.teacher_training.layer_decay):
            layer_rates((), decay)  # refuses what is none
        if not 0 < self.projection_rate < math.inf:
            raise RecipeError(f"projection_rate={self.projection_rate} must be above 0; 1 is the others' rate.")
        if not self.temperature > 0:
            raise RecipeError(f"temperature={self.temperature} must be above 0.")
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise RecipeError(f"average_decay={self.average_decay} must be above 0 and below 1; 0.999 is usual.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise RecipeError(f"mean={self.mean} and std={self.std} must be three numbers each, those of std above 0.")

    def steps_of(self, epochs: int, num_images: int) -> int:
        """Optimizer steps of so many epochs; the images that do not fill a batch are left out of each."""
        return epochs * (num_images // self.batch_size)


def adapt() -> AdaptationRun:
    """Ours: subcloning, then adaptive distillation of all directions, and of the logits:
    `transmamba adapt --teacher facebook/deit-tiny-patch16-224 --student plain_mamba_tiny --data my_images/`.

    The term of the logits is not the paper's, whose formula is `adapt_v2`. Optimizer and augmentation are those of the
    paper's public code, batches of 256 and no RandAugment.
    """
    return AdaptationRun(
        name="adapt",
        batch_size=256,
        weight_decay=0.05,
        adam_betas=(0.9, 0.999),
        max_gradient_norm=1.0,
        min_learning_rate_ratio=0.02,
        augmentation=Augmentation(crop_padding=4, flip=True, erase=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1),
        loss=AdaptionLoss(logit_weight=0.5),
        log_every=10,
    )


def adapt_v2() -> AdaptationRun:
    """The paper's second version: its loss as it is printed, without the logits."""
    return replace(adapt(), name="adapt_v2", output="", loss=AdaptionLoss())


def adapt_v1() -> AdaptationRun:
    """The paper's first version: one direction and its reverse."""
    return replace(adapt(), name="adapt_v1", output="", loss=AdaptionLoss(version="v1"))


def distil_only() -> AdaptationRun:
    """An ablation: `adapt` without subcloning."""
    return replace(adapt(), name="distil_only", output="", subcloning=SubcloningSettings(use=False))


def weight_reuse() -> AdaptationRun:
    """A baseline: subcloning, then the labels alone."""
    return replace(adapt(), name="weight_reuse", output="", method="task")


def from_scratch() -> AdaptationRun:
    """A baseline: a new student and the labels alone; a teacher is only compared with."""
    return replace(distil_only(), name="from_scratch", output="", method="task")


def soft_logits() -> AdaptationRun:
    """A baseline: a new student that learns the teacher's logits, and the labels."""
    return replace(distil_only(), name="soft_logits", output="", method="soft_logits")


def public_release() -> AdaptationRun:
    """A baseline: what the paper's public code does, a new student of the teacher's width and fixed weights."""
    return replace(distil_only(), name="public_release", output="", method="final_feature")


def bridging() -> AdaptationRun:
    """A baseline: B and C of a new student come near keys and queries, after CAB (arXiv 2510.19266)."""
    return replace(distil_only(), name="bridging", output="", method="bridging")


def mixing() -> AdaptationRun:
    """A baseline: mixing matrices of a new student come near attention, after MOHAWK (arXiv 2408.10189)."""
    return replace(distil_only(), name="mixing", output="", method="mixing")
