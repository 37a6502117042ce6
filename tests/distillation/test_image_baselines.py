"""What the adaption is compared with: each loss by hand, and what is tapped of the scans is what the scans compute."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, pad, silu, softmax

from tests.distillation.image_pairs import image_batch, teacher_of_images
from tests.helpers import relative_rms_error
from tests.models.vision_models import images, tiny_vision_model
from transmamba.distillation import (
    BridgingObjective,
    FinalFeatureObjective,
    MixingObjective,
    SoftLogitObjective,
    TaskObjective,
    make_bridges,
)
from transmamba.distillation.image_baselines import (
    matrix_distance,
    mixing_matrix,
    soft_logit_loss,
    teacher_logits,
    token_indices,
)
from transmamba.distillation.scan_signals import ScanSignal, watched_scans
from transmamba.distillation.vision_teacher import TeacherSignals
from transmamba.errors import InputError
from transmamba.modules import scan_order

FP32_BOUND = 1e-5  # sums of some tens of fp32 products in two orders


def small_signals(grid: tuple[int, int] = (2, 3), others: int = 1, heads: int = 2) -> TeacherSignals:
    tokens = torch.randn(2, others + grid[0] * grid[1], 8)
    return TeacherSignals(
        logits=torch.randn(2, 5),
        tokens=(tokens,),
        feature=tokens[:, 0],
        num_others=others,
        grid=grid,
        num_heads=heads,
        queries=(torch.randn_like(tokens),),
        keys=(torch.randn_like(tokens),),
    )


def test_the_task_is_cross_entropy() -> None:
    model, batch = tiny_vision_model("vim"), image_batch(soft=True)
    loss, metrics = TaskObjective()(model, batch)
    assert loss.item() == pytest.approx(cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).item())
    assert metrics["task_loss"] == loss


def test_soft_logits_are_kl_with_temperature_squared() -> None:
    model, teacher, batch = tiny_vision_model("vim"), teacher_of_images(), image_batch()
    loss, _ = SoftLogitObjective(teacher, temperature=3.0, soft_weight=0.4)(model, batch)
    ours, theirs = model(batch["pixel_values"]).logits, teacher(batch["pixel_values"]).logits
    kl = kl_div(log_softmax(ours / 3, -1), log_softmax(theirs / 3, -1), log_target=True, reduction="batchmean")
    wanted = 0.4 * 9 * kl + 0.6 * cross_entropy(ours, batch["labels"])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert soft_logit_loss(theirs, theirs, 2.0).item() == 0
    with pytest.raises(InputError, match=r"temperature=0 must be above 0 and soft_weight=0\.5 between 0 and 1"):
        SoftLogitObjective(teacher, temperature=0)


def test_the_public_codes_loss_is_as_described() -> None:
    """task + 120 H(t, s) + sum over i < N of i H(t, s_i), over channels, all softened by 2, without 2 squared."""
    teacher = teacher_of_images()
    model = tiny_vision_model("plain_mamba", hidden_size=24)
    batch = image_batch()
    loss, metrics = FinalFeatureObjective(teacher)(model, batch)
    t = teacher.model.deit(batch["pixel_values"]).last_hidden_state[:, 0]
    out = model(batch["pixel_values"], output_hidden_states=True)

    def h(s: Tensor) -> Tensor:
        return -(softmax(t / 2, -1) * log_softmax(s / 2, -1)).sum(-1).mean()

    pooled = model.backbone.norm(out.hidden_states[3]).mean(1)
    layer = 1 * h(out.hidden_states[1].mean(1)) + 2 * h(out.hidden_states[2].mean(1))
    wanted = cross_entropy(out.logits, batch["labels"]) + 120 * h(pooled) + layer
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert metrics["layer_loss"].item() == pytest.approx(layer.item(), rel=1e-5)
    with pytest.raises(InputError, match="the student is 16 wide and the teacher 24; choose a student"):
        FinalFeatureObjective(teacher)(tiny_vision_model("plain_mamba"), batch)


def scans_of(family: str) -> tuple[Any, list[ScanSignal], list[Tensor], list[Tensor]]:
    """The first layer of a model: its signals, what each scan reads, and what it gives before gate and merge."""
    model, x = tiny_vision_model(family, dtype=torch.float64), images(family, dtype=torch.float64)
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():  # so that what a scan adds to its input is not small
        for name in ("x_proj", "x_proj_b"):
            if hasattr(mixer, name):
                getattr(mixer, name).weight.mul_(20)
    read: list[Tensor] = []
    mixer.in_proj.register_forward_hook(lambda _, __, output: read.append(output))
    with torch.no_grad(), watched_scans(model) as watch:
        directions = model(x, output_directions=True).directions
    signals = watch.signals(directions)[0]
    inner, z = read[0].chunk(2, dim=-1)
    if family == "plain_mamba":
        image = silu(mixer.conv2d(inner.transpose(1, 2).unflatten(2, (4, 4)))).flatten(2)
        inputs = [scan_order(one.name, (4, 4)).scan(image, 2) for one in directions[0]]
        return model, list(signals), inputs, [one.features.transpose(1, 2) for one in directions[0]]
    inputs, outputs = [], []
    for conv, flip, one in zip((mixer.conv1d, mixer.conv1d_b), (False, True), directions[0], strict=True):
        u = inner.transpose(1, 2).flip(-1) if flip else inner.transpose(1, 2)
        inputs.append(silu(conv(pad(u, (mixer.conv1d.kernel_size[0] - 1, 0)))))
        gate = silu(z.flip(1) if flip else z)
        outputs.append((one.features / gate).transpose(1, 2))
    return model, list(signals), inputs, outputs


@pytest.mark.parametrize("family", ["plain_mamba", "vim", "video_mamba"])
def test_a_mixing_matrix_is_what_the_scan_computes(family: str) -> None:
    """With a head for every channel nothing is averaged, and the matrix times the inputs is the scan."""
    _, signals, inputs, outputs = scans_of(family)
    for signal, u, y in zip(signals, inputs, outputs, strict=True):
        matrix = mixing_matrix(signal, heads=signal.dt.shape[-1]).double()
        found = torch.einsum("bdij,bdj->bdi", matrix, u)
        assert relative_rms_error(found, y) < FP32_BOUND
        other = mixing_matrix(ScanSignal(**(vars(signal) | {"B": signal.C, "C": signal.B})), signal.dt.shape[-1])
        assert relative_rms_error(torch.einsum("bdij,bdj->bdi", other.double(), u), y) > 10 * FP32_BOUND


def test_matrices_of_all_directions_are_added_where_the_tokens_are() -> None:
    teacher = small_signals()
    orders = [scan_order(name, (2, 3)).order for name in ("raster", "snake_reversed")]
    signals = tuple(
        ScanSignal(
            dt=torch.rand(2, 6, 4),
            B=torch.randn(2, 6, 3),
            C=torch.randn(2, 6, 3),
            A=-torch.rand(4, 3),
            D=torch.rand(4),
            patches=order,
        )
        for order in orders
    )
    total = torch.zeros(2, 2, 6, 6)
    for signal in signals:
        matrix = mixing_matrix(signal, 2)
        for i in range(6):
            for j in range(6):
                total[:, :, signal.patches[i], signal.patches[j]] += matrix[:, :, i, j]
    q, k = (x[0].unflatten(-1, (2, 4)).transpose(1, 2) for x in (teacher.queries, teacher.keys))
    attention = softmax(q @ k.transpose(-1, -2) / 2, dim=-1)[:, :, 1:, 1:]
    wanted = (total - attention).square().sum(-1).mean()
    assert matrix_distance(signals, teacher, 0).item() == pytest.approx(wanted.item(), rel=1e-4)
    with pytest.raises(InputError, match="the student's 4 channels cannot be shared out over the teacher's 3 heads"):
        matrix_distance(signals, small_signals(heads=3), 0)


def test_steps_are_matched_with_tokens() -> None:
    patches = torch.tensor([5, 4, 3, -1, 2, 1, 0])
    assert token_indices(patches, small_signals(others=2)).tolist() == [7, 6, 5, 0, 4, 3, 2]
    with pytest.raises(InputError, match="the student has 6 patches and the teacher 3 x 3"):
        token_indices(patches, small_signals(grid=(3, 3)))


def test_bridges_meet_keys_and_queries_in_the_order_of_the_scan() -> None:
    student, teacher, batch = tiny_vision_model("vim"), teacher_of_images(num_hidden_layers=1), image_batch()
    bridges = make_bridges(student, teacher, batch["pixel_values"])
    loss, metrics = BridgingObjective(student, teacher, bridges)(student, batch)
    theirs = teacher(batch["pixel_values"], with_attention=True)
    key, query = softmax(theirs.keys[0], 1), softmax(theirs.queries[0], 2)
    middle = [*range(2, 10), 0, *range(10, 18)]
    with watched_scans(student) as watch:
        out = student(batch["pixel_values"], output_directions=True)
    total = 0.0
    for i, signals in enumerate(watch.signals(out.directions)):
        for m, order in enumerate((middle, middle[::-1])):
            place = 2 * i + m
            total += (bridges.of_B[place](signals[m].B) - key[:, order]).square().mean()
            total += (bridges.of_C[place](signals[m].C) - query[:, order]).square().mean()
    assert metrics["bridge_loss"].item() == pytest.approx(total.item() / 3, rel=1e-4)
    assert loss.item() == pytest.approx(metrics["soft_loss"].item() + total.item(), rel=1e-4)


@pytest.mark.parametrize("family", ["plain_mamba", "vim", "video_mamba"])
@pytest.mark.parametrize("method", ["bridging", "mixing"])
def test_gradients_reach_what_the_scans_read(family: str, method: str) -> None:
    student, batch = tiny_vision_model(family), image_batch()
    teacher = teacher_of_images("ViT")
    objective: Any = MixingObjective(student, teacher)
    if method == "bridging":
        objective = BridgingObjective(student, teacher, make_bridges(student, teacher, batch["pixel_values"]))
    loss, metrics = objective(student, batch)
    loss.backward()
    mixer = student.backbone.layers[1].mixer
    assert mixer.x_proj.weight.grad.any()
    assert mixer.A_log.grad.any()
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert not any(value.requires_grad for value in metrics.values())
    assert not any(module._forward_hooks for module in student.modules())


def test_a_student_comes_near_the_teachers_attention() -> None:
    student, batch = tiny_vision_model("vim"), image_batch(4)
    objective = MixingObjective(student, teacher_of_images(), matrix_weight=10.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    distances = []
    for _ in range(40):
        loss, metrics = objective(student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append(metrics["matrix_loss"].item())
    assert distances[-1] < 0.6 * distances[0]


def test_what_does_not_fit_is_one_line() -> None:
    with (
        pytest.raises(InputError, match="makes B and C of all directions in one product"),
        watched_scans(tiny_vision_model("vmamba")),
    ):
        pass
    with pytest.raises(InputError, match="the teacher has 5 classes and the student 7; fine-tune the teacher"):
        teacher_logits(small_signals(), torch.zeros(2, 7))
    without = TeacherSignals(**(vars(small_signals()) | {"logits": None}))
    with pytest.raises(InputError, match="the teacher has no head and the student 5"):
        teacher_logits(without, torch.zeros(2, 5))
