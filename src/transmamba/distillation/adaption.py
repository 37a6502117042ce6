"""Stage 2 of the adaption: every layer and scan direction of a student comes near its teacher's tokens.

With c_im as in `directions`, w_im as in `layer_weights`, N layers and M directions

    v2    L = alpha (1/M) sum over m of (1/N) sum over i of w_im (1 - c_im)  +  beta L_task
    v1    the same with two directions, the first one and its reverse, whose terms are added: alpha is 1 - alpha of the
          paper's first version and beta its alpha

and, where logit_weight is above 0, logit_weight times the KL of the teacher's logits, which is not the paper's.

Source: Chen et al. 2025 (arXiv 2502.15130), versions 1 and 2; what they leave open is decided in docs/adaption.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transmamba.distillation.directions import (
    CLASS_TOKENS,
    places_of,
    target_layer,
    tokens_on_grid,
)
from transmamba.distillation.image_losses import Metrics, share_of_step, soft_logit_loss, task_loss, teacher_logits
from transmamba.distillation.layer_weights import LAYER_WEIGHTS, layer_weights
from transmamba.distillation.projections import LatentProjections
from transmamba.distillation.vision_teacher import TeacherSignals, VisionTeacher
from transmamba.errors import InputError
from transmamba.models import VideoMambaConfig, VimConfig, VisionMambaClassifier
from transmamba.modules import DirectionOutput
from transmamba.modules.scan_orders import REVERSED
from transmamba.ops import token_cosines

VERSIONS = ("v1", "v2")
FEATURES = ("directions", "merged")
TARGETS = ("mapped", "final")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptionLoss:
    """What is compared, and how it is weighed.

    version: "v2" = all directions, their mean; "v1" = the first direction and its reverse, their sum.
    alpha, beta: of the feature loss and of the task's. logit_weight: of logit_temperature^2 KL(teacher || student) of
        the logits, which the paper does without.
    features: "directions" = of each scan before the merge; "merged" = the residual stream after each layer.
    target: "mapped" or "final"; see target_layer. class_token: "move" or "leave"; see teacher_in_order.
    layer_weights, temperature: see layer_weights.
    """

    version: str = "v2"
    alpha: float = 0.5
    beta: float = 0.5
    logit_weight: float = 0.0
    logit_temperature: float = 2.0
    features: str = "directions"
    target: str = "mapped"
    class_token: str = "move"
    layer_weights: str = "ratio"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        for name, known in (
            ("version", VERSIONS),
            ("features", FEATURES),
            ("target", TARGETS),
            ("class_token", CLASS_TOKENS),
            ("layer_weights", tuple(LAYER_WEIGHTS)),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
        for name in ("alpha", "beta", "logit_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)} must be at least 0.")
        for name, usual in (("temperature", "0.1 tells cosines apart"), ("logit_temperature", "2 is usual")):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} must be above 0; {usual}.")


class AdaptionObjective:
    """Return alpha times the feature loss plus beta times the task's, and the weight and cosine of every layer.

    A batch holds pixel_values (batch, channels, height, width) and labels, class numbers (batch,) or probabilities
    (batch, classes). The projections have to be `attached` to the student while it trains, and no longer.
    """

    def __init__(
        self,
        student: VisionMambaClassifier,
        teacher: VisionTeacher,
        projections: LatentProjections,
        settings: AdaptionLoss | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.projections = projections
        self.settings = settings or AdaptionLoss()

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        pixel_values, labels = batch["pixel_values"], batch["labels"]
        theirs = self.teacher(pixel_values)
        out = model(pixel_values, output_directions=True, output_hidden_states=self.settings.features == "merged")
        layers = student_features(self.student, out, self.settings)
        feature, cosines, weights = feature_loss(layers, theirs, self.projections, self.settings)
        task = task_loss(out.logits, labels)
        total = self.settings.alpha * feature + self.settings.beta * task
        metrics: dict[str, Tensor | float] = {"task_loss": task.detach(), "feature_loss": feature.detach()}
        if self.settings.logit_weight:
            soft = soft_logit_loss(out.logits, teacher_logits(theirs, out.logits), self.settings.logit_temperature)
            total = total + self.settings.logit_weight * soft
            metrics["soft_loss"] = soft.detach()
        for layer, (cosine, weight) in enumerate(zip(cosines, weights, strict=True)):
            metrics |= {f"cosine_{layer}": cosine, f"weight_{layer}": weight}
        return total * share_of_step(batch), metrics


def make_projections(
    student: VisionMambaClassifier,
    teacher: VisionTeacher,
    pixel_values: Tensor,
    settings: AdaptionLoss,
    *,
    sharing: str = "direction",
    padding: bool = True,
) -> LatentProjections:
    """Projections of the sizes that the student's features have on such images, on the student's device."""
    was_training = student.training
    student.eval()  # running statistics are not touched
    with torch.no_grad():
        out = student(pixel_values[:1], output_directions=True, output_hidden_states=True)
    student.train(was_training)
    widths = [{one.name: one.features.shape[-1] for one in layer} for layer in student_features(student, out, settings)]
    return LatentProjections(widths, teacher.hidden_size, sharing=sharing, padding=padding).to(pixel_values.device)


def student_features(
    student: VisionMambaClassifier, out: Any, settings: AdaptionLoss
) -> list[tuple[DirectionOutput, ...]]:
    """For every layer the features that are compared; out: the student's output with directions.

    Raises:
        InputError: version 1 is asked for and the student has no reverse of its first direction.
    """
    if settings.features == "merged":
        in_scan_order = isinstance(student.config, VideoMambaConfig | VimConfig)
        return [
            (_merged(state, layer[0], in_scan_order),)
            for state, layer in zip(out.hidden_states[1:], out.directions, strict=True)
        ]
    if settings.version == "v2":
        return list(out.directions)
    chosen: list[tuple[DirectionOutput, ...]] = []
    for layer in out.directions:
        first = layer[0].name
        reverse = first.removesuffix(REVERSED) if first.endswith(REVERSED) else first + REVERSED
        both = tuple(one for one in layer if one.name in (first, reverse))
        if len(both) != 2:
            raise InputError(
                f"version='v1' compares {first!r} and its reverse, and the student has "
                f"{', '.join(one.name for one in layer)}; use 'v2'."
            )
        chosen.append(both)
    return chosen


def feature_loss(
    layers: Sequence[Sequence[DirectionOutput]],
    teacher: TeacherSignals,
    projections: LatentProjections,
    settings: AdaptionLoss,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the feature loss, and the cosine and weight of every layer, means over directions, without gradient."""
    stacked: dict[tuple[str, ...], Tensor] = {}
    known: dict[Any, Any] = {}
    cosines = [
        _cosines(number, len(layers), layer, projections.of_layer(number, layer, stacked), teacher, settings, known)
        for number, layer in enumerate(layers)
    ]
    if len({one.shape for one in cosines}) == 1:
        c = torch.stack(cosines).mean(dim=(-2, -1))
    else:  # a pyramid
        c = torch.stack([one.mean(dim=(-2, -1)) for one in cosines])
    weights = layer_weights(c, settings.layer_weights, temperature=settings.temperature)
    per_direction = (weights * (1 - c)).mean(dim=0)
    loss = per_direction.sum() if settings.version == "v1" else per_direction.mean()
    return loss, c.detach().mean(dim=1), weights.mean(dim=1)


def _cosines(
    number: int,
    num_layers: int,
    layer: Sequence[DirectionOutput],
    ours: Tensor,
    teacher: TeacherSignals,
    settings: AdaptionLoss,
    known: dict[Any, Any],
) -> Tensor:
    """The cosines (directions, batch, steps) of a layer's projected features with the teacher's tokens.

    known: what earlier layers have found: the teacher's tokens on a grid, and which of them the steps of scans meet.
    """
    block = target_layer(number, num_layers, len(teacher.tokens), target=settings.target)
    grid = layer[0].grid
    if (block, grid) not in known:
        known[block, grid] = tokens_on_grid(teacher.tokens[block], teacher.num_others, teacher.grid, grid)
    orders = tuple(one.patches for one in layer)
    if orders not in known:
        found = [places_of(one, teacher.num_others, class_token=settings.class_token) for one in layer]
        steps = [one for _, one in found if one is not None]
        known[orders] = torch.stack([one for one, _ in found]), torch.stack(steps) if steps else None
    places, steps = known[orders]
    if steps is not None:
        ours = torch.stack([one[:, kept] for one, kept in zip(ours, steps, strict=True)])
    return token_cosines(ours, known[block, grid], places, validate=False)


def _merged(state: Tensor, first: DirectionOutput, in_scan_order: bool) -> DirectionOutput:
    """The residual stream after a layer, as a direction of its own order: the first scan's, or the image's."""
    patches = first.patches if in_scan_order else torch.arange(state.shape[1], device=state.device)
    return DirectionOutput(name="merged", features=state, patches=patches, grid=first.grid)
