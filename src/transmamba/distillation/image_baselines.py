"""What the adaption is compared with, as objectives of the same Trainer on the same batches.

TaskObjective           the labels alone: from scratch, or weight reuse where the student was subcloned
SoftLogitObjective      the teacher's logits (Hinton et al. 2015, arXiv 1503.02531)
FinalFeatureObjective   the public code of arXiv 2502.15130: fixed weights, the teacher's last feature for all blocks
BridgingObjective       B and C come near keys and queries (CAB, arXiv 2510.19266)
MixingObjective         mixing matrices come near attention (after MOHAWK, arXiv 2408.10189), and the logits
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, mse_loss, softmax
from torch.utils.checkpoint import checkpoint

from transmamba.distillation.directions import target_layer
from transmamba.distillation.image_losses import Metrics, share_of_step, soft_logit_loss, task_loss, teacher_logits
from transmamba.distillation.scan_signals import ScanSignal, watched_scans
from transmamba.distillation.vision_teacher import TeacherSignals, VisionTeacher
from transmamba.errors import InputError
from transmamba.models import VisionMambaClassifier
from transmamba.modules import DirectionOutput
from transmamba.modules.scan_orders import TOKEN_WITHOUT_PATCH

BRIDGE_WIDTH = 128  # of the hidden layer between B or C and keys or queries, as in CAB
BRIDGE_WEIGHT = 3.0  # of the squared error beside KL, as in CAB
RELEASE_TEMPERATURE, RELEASE_WEIGHT = 2.0, 120.0  # of the public code's feature loss


class TaskObjective:
    """The cross-entropy with the labels."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        loss = task_loss(model(batch["pixel_values"]).logits, batch["labels"])
        return loss * share_of_step(batch), {"task_loss": loss.detach()}


class SoftLogitObjective:
    """soft_weight temperature^2 KL(teacher || student) plus (1 - soft_weight) times the task's loss."""

    def __init__(self, teacher: VisionTeacher, *, temperature: float = 2.0, soft_weight: float = 0.5) -> None:
        if not temperature > 0 or not 0 <= soft_weight <= 1:
            raise InputError(
                f"temperature={temperature} must be above 0 and soft_weight={soft_weight} between 0 and 1."
            )
        self.teacher = teacher
        self.temperature = temperature
        self.soft_weight = soft_weight

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        theirs = self.teacher(batch["pixel_values"])
        logits = model(batch["pixel_values"]).logits
        soft = soft_logit_loss(logits, teacher_logits(theirs, logits), self.temperature)
        task = task_loss(logits, batch["labels"])
        total = self.soft_weight * soft + (1 - self.soft_weight) * task
        return total * share_of_step(batch), {"task_loss": task.detach(), "soft_loss": soft.detach()}


class FinalFeatureObjective:
    """The loss of the public code, as it is: task + 120 kd + sum over layers i < N of i layer_i.

    kd and layer_i are cross-entropies over the channels of features softened by 2: the teacher's class token after its
    final norm against the student's pooled feature, and against the mean of the tokens after each block.
    """

    def __init__(self, teacher: VisionTeacher) -> None:
        self.teacher = teacher

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        theirs = self.teacher(batch["pixel_values"])
        out = model(batch["pixel_values"], output_hidden_states=True)
        blocks = [state.mean(dim=1) for state in out.hidden_states[1:-1]]
        for features in (*blocks, out.pooler_output):
            if features.shape[-1] != theirs.feature.shape[-1]:
                raise InputError(
                    f"this loss compares channel with channel: the student is {features.shape[-1]} wide and the "
                    f"teacher {theirs.feature.shape[-1]}; choose a student of the teacher's width, or another method."
                )
        task = task_loss(out.logits, batch["labels"])
        kd = channel_cross_entropy(theirs.feature, out.pooler_output)
        terms = [number * channel_cross_entropy(theirs.feature, x) for number, x in enumerate(blocks, start=1)]
        layer = torch.stack(terms).sum() if terms else torch.zeros_like(kd)
        metrics = {"task_loss": task.detach(), "feature_loss": kd.detach(), "layer_loss": layer.detach()}
        return (task + RELEASE_WEIGHT * kd + layer) * share_of_step(batch), metrics


class BridgingObjective:
    """KL(teacher || student) + 3 times the squared error between bridged B, C and the teacher's keys, queries.

    The teacher's keys pass a softmax over tokens, its queries one over channels; both are put in the order of the
    scan, with the class token where the student has it. The bridges have to be `attached` while the student trains.
    """

    def __init__(self, student: VisionMambaClassifier, teacher: VisionTeacher, bridges: "Bridges") -> None:
        self.student = student
        self.teacher = teacher
        self.bridges = bridges

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        theirs = self.teacher(batch["pixel_values"], with_attention=True)
        with watched_scans(self.student) as watch:
            out = model(batch["pixel_values"], output_directions=True)
        layers = watch.signals(out.directions)
        terms = []
        for number, signals in enumerate(layers):
            at = target_layer(number, len(layers), len(theirs.keys))
            keys, queries = softmax(theirs.keys[at].float(), dim=1), softmax(theirs.queries[at].float(), dim=2)
            for place, signal in enumerate(signals):
                tokens = token_indices(signal.patches, theirs)
                bridged_B, bridged_C = self.bridges(number, place, signal)
                terms.append(
                    mse_loss(bridged_B.float(), keys[:, tokens]) + mse_loss(bridged_C.float(), queries[:, tokens])
                )
        bridge = torch.stack(terms).sum() / len(layers)
        soft = soft_logit_loss(out.logits, teacher_logits(theirs, out.logits), 1.0)
        loss = soft + BRIDGE_WEIGHT * bridge
        return loss * share_of_step(batch), {"soft_loss": soft.detach(), "bridge_loss": bridge.detach()}


class Bridges(nn.Module):
    """For every layer and direction, B and C (…, state_size) to the teacher's width, by two layers and SiLU."""

    def __init__(self, layers: int, directions: int, state_size: int, target: int) -> None:
        super().__init__()
        self.directions = directions
        self.of_B = nn.ModuleList([_bridge(state_size, target) for _ in range(layers * directions)])
        self.of_C = nn.ModuleList([_bridge(state_size, target) for _ in range(layers * directions)])

    def forward(self, layer: int, direction: int, signal: ScanSignal) -> tuple[Tensor, Tensor]:
        place = layer * self.directions + direction
        return self.of_B[place](signal.B), self.of_C[place](signal.C)


class MixingObjective:
    """matrix_weight times the distance of mixing matrices and attention, plus the soft logits and the task's loss.

    After MOHAWK's first stage, in one: here the student reads its own input, since widths may differ, and the channels
    of a head, of which Mamba-1 has as many matrices, are taken together by their mean step and decay.
    """

    def __init__(
        self,
        student: VisionMambaClassifier,
        teacher: VisionTeacher,
        *,
        matrix_weight: float = 1.0,
        temperature: float = 2.0,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.matrix_weight = matrix_weight
        self.temperature = temperature

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Metrics]:
        theirs = self.teacher(batch["pixel_values"], with_attention=True)
        with watched_scans(self.student) as watch:
            out = model(batch["pixel_values"], output_directions=True)
        layers = watch.signals(out.directions)
        terms = []
        for number, signals in enumerate(layers):
            at = target_layer(number, len(layers), len(theirs.keys))
            terms.append(matrix_distance(signals, theirs, at))
        matrices = torch.stack(terms).mean()
        soft = soft_logit_loss(out.logits, teacher_logits(theirs, out.logits), self.temperature)
        task = task_loss(out.logits, batch["labels"])
        loss = self.matrix_weight * matrices + 0.5 * soft + 0.5 * task
        metrics = {"task_loss": task.detach(), "soft_loss": soft.detach(), "matrix_loss": matrices.detach()}
        return loss * share_of_step(batch), metrics


def channel_cross_entropy(teacher: Tensor, student: Tensor, temperature: float = RELEASE_TEMPERATURE) -> Tensor:
    """H(softmax(teacher / temperature), softmax(student / temperature)) over channels, the mean over the batch."""
    target = softmax(teacher.float() / temperature, dim=-1)
    return -torch.sum(target * log_softmax(student.float() / temperature, dim=-1), dim=-1).mean()


def matrix_distance(signals: tuple[ScanSignal, ...], teacher: TeacherSignals, layer: int) -> Tensor:
    """The squared distance of rows between the summed mixing matrices of all directions and a block's attention.

    The mean over batch, heads and rows; over the tokens that the student has.
    """
    heads = teacher.num_heads
    channels = signals[0].dt.shape[-1]
    if channels % heads:
        raise InputError(
            f"the student's {channels} channels cannot be shared out over the teacher's {heads} heads; choose a width "
            "that can."
        )
    total: Tensor | None = None
    for signal in signals:
        matrix: Any = checkpoint(mixing_matrix, signal, heads, use_reentrant=False)
        inverse = torch.argsort(token_indices(signal.patches, teacher))
        matrix = matrix[:, :, inverse][:, :, :, inverse]
        total = matrix if total is None else total + matrix
    assert total is not None
    tokens = token_indices(signals[0].patches, teacher).sort().values
    q, k = (x[layer].float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (teacher.queries, teacher.keys))
    attention = softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)[:, :, tokens][:, :, :, tokens]
    return (total - attention).square().sum(-1).mean()


def mixing_matrix(signal: ScanSignal, heads: int) -> Tensor:
    """(batch, heads, steps, steps): how much step i takes of step j <= i in one scan, in scan order.

    With S the running sum of a head's mean step, and A and D its means: sum over n of C_in exp(A_n (S_i - S_j)) dt_j
    B_jn, and D more at i = j.
    """
    with torch.autocast(signal.dt.device.type, enabled=False):  # differences of running sums need fp32
        dt = signal.dt.unflatten(-1, (heads, -1)).mean(-1).transpose(1, 2)  # (batch, heads, steps)
        A = signal.A.unflatten(0, (heads, -1)).mean(1)
        D = signal.D.float().unflatten(0, (heads, -1)).mean(1)
        steps = dt.shape[-1]
        S = dt.cumsum(-1)
        past = torch.ones(steps, steps, dtype=torch.bool, device=dt.device).tril()
        # Zero where j comes after i, before the exponential: infinity there would make the gradient of A a NaN.
        elapsed = (S[..., :, None] - S[..., None, :]).masked_fill(~past, 0.0)
        decay = torch.exp(A[:, :, None, None] * elapsed[:, :, None]) * past  # (batch, heads, n, steps, steps)
        mixed = torch.einsum("bin,bjn,bhnij->bhij", signal.C.float(), signal.B.float(), decay)
        return mixed * dt[..., None, :] + torch.diag_embed(D[:, None].expand(heads, steps))


def token_indices(patches: Tensor, teacher: TeacherSignals) -> Tensor:
    """For every step of a scan, the teacher's token: its class token, or the patch.

    Raises:
        InputError: the grids differ.
    """
    if int(patches.max()) + 1 != teacher.grid[0] * teacher.grid[1]:
        raise InputError(
            f"the student has {int(patches.max()) + 1} patches and the teacher {teacher.grid[0]} x {teacher.grid[1]}; "
            "choose patch sizes that agree, or another method."
        )
    return torch.where(patches == TOKEN_WITHOUT_PATCH, 0, patches + teacher.num_others)


def make_bridges(student: VisionMambaClassifier, teacher: VisionTeacher, pixel_values: Tensor) -> Bridges:
    """Bridges of the student's sizes, on its device."""
    with torch.no_grad(), watched_scans(student) as watch:
        was_training = student.training
        student.eval()
        directions: tuple[tuple[DirectionOutput, ...], ...] = student(
            pixel_values[:1], output_directions=True
        ).directions
        student.train(was_training)
    signals = watch.signals(directions)
    made = Bridges(len(signals), len(signals[0]), signals[0][0].B.shape[-1], teacher.hidden_size)
    return made.to(pixel_values.device)


def _bridge(width: int, target: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, BRIDGE_WIDTH), nn.SiLU(), nn.Linear(BRIDGE_WIDTH, target))
