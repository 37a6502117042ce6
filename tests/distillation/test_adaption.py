"""The adaption's loss: its value by hand, where its gradients go, and that the projections are gone afterwards."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, layer_norm

from tests.distillation.image_pairs import adaption, image_batch, teacher_of_images
from tests.helpers import Dispatched
from tests.models.vision_models import tiny_vision_model
from tests.ops.kernels import needs_triton
from transmamba.distillation import (
    AdaptionLoss,
    AdaptionObjective,
    LatentProjections,
    TeacherSignals,
    VisionTeacher,
    attached,
    direction_cosine,
    feature_loss,
    make_projections,
    student_features,
    target_layer,
    teacher_in_order,
)
from transmamba.distillation.layer_weights import LAYER_WEIGHTS, layer_weights
from transmamba.errors import InputError
from transmamba.models import VimForImageClassification
from transmamba.modules import DirectionOutput, scan_order

FAMILIES = ["plain_mamba", "vim", "vmamba", "video_mamba"]


class Identity(LatentProjections):
    """Projections for features that are in the teacher's space already."""

    def __init__(self) -> None:
        super().__init__([], 7)

    def forward(self, layer: int, direction: DirectionOutput) -> torch.Tensor:
        return direction.features


def teacher_as_student(grid: tuple[int, int] = (3, 4)) -> tuple[list[tuple[DirectionOutput, ...]], TeacherSignals]:
    tokens = tuple(torch.randn(2, 1 + grid[0] * grid[1], 7, dtype=torch.float64) for _ in range(3))
    signals = TeacherSignals(logits=None, tokens=tokens, feature=tokens[-1][:, 0], num_others=1, grid=grid, num_heads=1)
    names = ("raster", "raster_reversed", "snake")
    layers = [
        tuple(
            DirectionOutput(name, scan_order(name, grid).scan(x[:, 1:], 1), scan_order(name, grid).order, grid)
            for name in names
        )
        for x in tokens
    ]
    return layers, signals


# Specification, section 7, check 3.
def test_the_teacher_as_its_own_student_has_no_loss() -> None:
    layers, signals = teacher_as_student()
    loss, cosines, weights = feature_loss(layers, signals, Identity(), AdaptionLoss())
    # Layer norm's epsilon of 1e-5 acts alike on both sides; the rest is rounding of fp64.
    assert cosines.tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    assert weights.tolist() == pytest.approx([1, 1, 1], abs=1e-12)
    assert abs(loss.item()) < 1e-12
    wrong_order = [tuple(reversed(layer)) for layer in layers[:1]] + layers[1:]
    assert feature_loss(wrong_order, signals, Identity(), AdaptionLoss())[0].item() < 1e-12  # names go with features
    swapped = [layers[1], layers[0], layers[2]]
    assert feature_loss(swapped, signals, Identity(), AdaptionLoss())[0].item() > 0.3


def test_the_loss_is_the_formula() -> None:
    student, objective, projections = adaption("vim", alpha=0.7, beta=0.2)
    batch = image_batch()
    loss, metrics = objective(student, batch)
    theirs = objective.teacher(batch["pixel_values"])
    out = student(batch["pixel_values"], output_directions=True)
    total = 0.0
    for m in range(2):
        cosines = []
        for i in range(3):
            y = projections.by_key[["raster_32", "raster_reversed_32"][m]](out.directions[i][m].features)
            t = theirs.tokens[i]
            patches = t[:, 2:]  # after the class and the distillation token
            t = torch.cat([patches[:, :8], t[:, :1], patches[:, 8:]], dim=1)  # the class token in the middle
            t = t.flip(1) if m else t
            cosines.append(cosine_similarity(layer_norm(y, (24,)), layer_norm(t, (24,)), dim=-1).mean())
        c = torch.stack(cosines)
        w = c.detach().clamp(0.05, 1).mean() / c.detach().clamp(0.05, 1)
        total = total + ((w * 3 / w.sum()) * (1 - c)).sum() / 3
    wanted = 0.7 * total / 2 + 0.2 * cross_entropy(out.logits, batch["labels"])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)  # two fp32 computations of one formula
    assert set(metrics) == {"task_loss", "feature_loss", *(f"{x}_{i}" for x in ("cosine", "weight") for i in range(3))}


def test_the_logits_are_a_term_of_their_own() -> None:
    batch = image_batch()
    losses = []
    for weight in (0.0, 0.3):
        torch.manual_seed(0)
        student, objective, _ = adaption("vim", logit_weight=weight, logit_temperature=3.0)
        loss, metrics = objective(student, batch)
        losses.append(loss.item())
    theirs, ours = objective.teacher(batch["pixel_values"]).logits, student(batch["pixel_values"]).logits
    p = torch.softmax(theirs / 3, dim=1)
    soft = 9 * (p * (p.log() - torch.log_softmax(ours / 3, dim=1))).sum(1).mean().item()
    assert metrics["soft_loss"].item() == pytest.approx(
        soft, rel=1e-4
    )  # differences of fp32 logarithms near each other
    assert losses[1] - losses[0] == pytest.approx(0.3 * soft, abs=1e-6)
    with pytest.raises(InputError, match=r"logit_weight=-1 must be at least 0"):
        AdaptionLoss(logit_weight=-1)
    with pytest.raises(InputError, match=r"logit_temperature=0 must be above 0; 2 is usual"):
        AdaptionLoss(logit_temperature=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", ["directions", "merged"])
def test_every_family_can_be_adapted(family: str, features: str) -> None:
    student, objective, projections = adaption(family, "ViT", features=features)
    loss, _ = objective(student, image_batch(soft=True))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in projections.parameters())
    assert next(student.backbone.patch_embed.parameters()).grad.any()


@pytest.mark.parametrize("scan", ["raster", "diagonal"])
@pytest.mark.parametrize("family", ["plain_mamba", "vim", "video_mamba"])
def test_the_merged_stream_is_compared_in_its_own_order(family: str, scan: str) -> None:
    fields = {} if family == "plain_mamba" else {"scan_order": scan}
    student = tiny_vision_model(family, **fields)
    x = image_batch()["pixel_values"]
    out = student(x, output_directions=True, output_hidden_states=True)
    merged = student_features(student, out, AdaptionLoss(features="merged"))
    assert len(merged) == 3
    assert torch.equal(merged[1][0].patches, student.backbone.sequence_patches(x))
    assert torch.equal(merged[1][0].features, out.hidden_states[2])


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("plain_mamba", ["snake", "snake_reversed"]),
        ("vim", ["raster", "raster_reversed"]),
        ("vmamba", ["raster", "raster_reversed"]),
    ],
)
def test_version_1_takes_one_direction_and_its_reverse(family: str, names: list[str]) -> None:
    student, objective, _ = adaption(family, version="v1")
    batch = image_batch()
    out = student(batch["pixel_values"], output_directions=True)
    layers = student_features(student, out, objective.settings)
    assert [[one.name for one in layer] for layer in layers] == [names] * len(layers)
    added = feature_loss(layers, objective.teacher(batch["pixel_values"]), objective.projections, objective.settings)
    mean = feature_loss(layers, objective.teacher(batch["pixel_values"]), objective.projections, AdaptionLoss())
    assert added[0].item() == pytest.approx(2 * mean[0].item(), rel=1e-6)


def test_version_1_needs_the_reverse() -> None:
    student = tiny_vision_model("plain_mamba", scan_orders=["snake", "snake_transposed"])
    out = student(image_batch()["pixel_values"], output_directions=True)
    with pytest.raises(InputError, match="compares 'snake' and its reverse, and the student has snake, snake_trans"):
        student_features(student, out, AdaptionLoss(version="v1"))


# Specification, section 7, check 7.
def test_gradients_reach_the_student_and_its_projections_only() -> None:
    student, objective, projections = adaption("plain_mamba", beta=0.0)
    spare = LatentProjections([{"diagonal": 32}], 24)
    projections.by_key.update(spare.by_key)
    loss, metrics = objective(student, image_batch())
    loss.backward()
    assert all(parameter.grad is None for parameter in objective.teacher.model.parameters())
    assert not objective.teacher.model.training
    assert all(parameter.grad is None for parameter in spare.parameters())
    used = [parameter.grad for key, parameter in projections.named_parameters() if "diagonal" not in key]
    assert used
    assert all(bool(gradient.any()) for gradient in used if gradient is not None)
    assert not any(torch.is_tensor(value) and value.requires_grad for value in metrics.values())
    assert student.classifier.weight.grad is None or not student.classifier.weight.grad.any()
    assert student.backbone.layers[0].mixer.in_proj.weight.grad.any()


# Specification, section 7, check 7.
def test_projections_are_a_part_of_the_student_while_it_trains_and_no_longer(tmp_path: Path) -> None:
    student, _, projections = adaption("vim")
    names = set(student.state_dict())
    with attached(student, projections):
        extra = set(student.state_dict()) - names
        assert extra == {f"training_parts.{name}" for name in projections.state_dict()}
        assert {id(x) for x in projections.parameters()} <= {id(x) for x in student.parameters()}
        with pytest.raises(AssertionError, match="one objective at a time"), attached(student, projections):
            pass
    assert set(student.state_dict()) == names
    student.save_pretrained(tmp_path)
    loaded = VimForImageClassification.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == names


def test_a_projection_that_fails_is_taken_off_too() -> None:
    student, _, projections = adaption("vim")
    with pytest.raises(RuntimeError), attached(student, projections):
        raise RuntimeError
    assert not hasattr(student, "training_parts")


@pytest.mark.parametrize(("sharing", "count"), [("direction", 4), ("layer", 3), ("none", 12)])
@pytest.mark.parametrize("padding", [True, False])
def test_projections_are_shared_as_asked(sharing: str, count: int, padding: bool) -> None:
    _, objective, projections = adaption("plain_mamba", sharing=sharing, padding=padding)
    assert len(projections.by_key) == count
    widths = {projection.linear.weight.shape for projection in projections.by_key.values()}
    assert widths == {(24, 32)}  # the mixer's 32 channels are more than the teacher's 24: nothing to pad
    merged = make_projections(
        tiny_vision_model("plain_mamba"),
        objective.teacher,
        image_batch()["pixel_values"],
        AdaptionLoss(features="merged"),
        padding=padding,
    )
    (projection,) = merged.by_key.values()
    assert projection.linear.weight.shape == (24, 24 if padding else 16)
    assert projection.padding == ((4, 4) if padding else (0, 0))


def test_making_projections_leaves_the_student_as_it_was() -> None:
    student = tiny_vision_model("plain_mamba").train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    make_projections(student, teacher_of_images(), image_batch()["pixel_values"], AdaptionLoss())
    assert student.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_parts_of_a_step_add_up_to_the_whole() -> None:
    student, objective, _ = adaption("vim", layer_weights="uniform")
    batch = image_batch(4)
    whole = objective(student, batch)[0]
    halves = [
        objective(student, {name: x[rows] for name, x in batch.items()} | {"num_items_in_batch": 4})[0]
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert sum(halves).item() == pytest.approx(whole.item(), rel=1e-5)


def test_a_student_comes_near_its_teacher() -> None:
    student, objective, projections = adaption("vim", beta=0.0)
    student.train()
    batch = image_batch(8)
    optimizer = torch.optim.AdamW([*student.parameters(), *projections.parameters()], lr=3e-3)
    losses = []
    for _ in range(40):
        loss, _ = objective(student, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_signals_of_the_teacher_are_its_own() -> None:
    teacher = teacher_of_images("DeiT with two heads")
    x = image_batch()["pixel_values"]
    signals = teacher(x, with_attention=True)
    output = teacher.model(pixel_values=x)
    assert torch.equal(signals.logits, output.logits)
    assert len(signals.tokens) == len(signals.queries) == len(signals.keys) == 3
    assert (signals.num_others, signals.grid, signals.num_heads) == (2, (4, 4), 2)
    assert torch.equal(teacher.model.cls_classifier(signals.feature), output.cls_logits)
    assert not any(module._forward_hooks for module in teacher.model.modules())


def test_images_of_another_size_and_other_models_are_refused() -> None:
    with pytest.raises(InputError, match="reads images of 3 x 32 x 32 and these are 3 x 48 x 32; set image_size"):
        teacher_of_images()(torch.zeros(1, 3, 48, 32))
    with pytest.raises(InputError, match="VimForImageClassification is no teacher of images"):
        VisionTeacher(tiny_vision_model("vim"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "v3"}, "version='v3' is unknown; choose one of v1, v2"),
        ({"features": "gates"}, "features='gates' is unknown"),
        ({"layer_weights": "depth"}, "layer_weights='depth' is unknown"),
        ({"alpha": -1.0}, r"alpha=-1\.0 must be at least 0"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AdaptionLoss(**settings)
    with pytest.raises(InputError, match="sharing='all' is unknown"):
        LatentProjections([], 3, sharing="all")


def one_by_one(
    layers: list[tuple[DirectionOutput, ...]],
    theirs: TeacherSignals,
    projections: LatentProjections,
    settings: AdaptionLoss,
) -> torch.Tensor:
    """The feature loss, direction by direction and layer by layer, from the public parts."""
    terms = []
    for column in zip(*layers, strict=True):
        cosines = []
        for number, direction in enumerate(column):
            tokens = theirs.tokens[target_layer(number, len(column), len(theirs.tokens), target=settings.target)]
            wanted, steps = teacher_in_order(
                tokens, theirs.num_others, theirs.grid, direction, class_token=settings.class_token
            )
            cosines.append(direction_cosine(projections(number, direction)[:, steps], wanted))
        c = torch.stack(cosines)
        terms.append((layer_weights(c, settings.layer_weights) * (1 - c)).mean())
    return torch.stack(terms).sum() if settings.version == "v1" else torch.stack(terms).mean()


@pytest.mark.parametrize("sharing", ["direction", "layer"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("plain_mamba", {}),
        ("plain_mamba", {"version": "v1", "target": "final"}),
        ("vim", {}),
        ("vim", {"class_token": "leave", "layer_weights": "linear"}),
        ("vmamba", {"layer_weights": "softmax"}),
    ],
    ids=str,
)
def test_all_directions_at_once_are_each_by_itself(family: str, settings: dict[str, Any], sharing: str) -> None:
    """In fp64, the loss and every gradient; of PlainMamba, whose directions are one tensor, with products of all."""
    student, objective, projections = adaption(family, sharing=sharing, **settings)
    student, projections = student.double(), projections.double()
    pixels = image_batch()["pixel_values"]
    theirs = objective.teacher(pixels)
    tokens = tuple(x.double() for x in theirs.tokens)
    theirs = TeacherSignals(None, tokens, theirs.feature, theirs.num_others, theirs.grid, theirs.num_heads)
    parameters = [*student.backbone.parameters(), *projections.parameters()]
    found = []
    for form in (lambda *given: feature_loss(*given)[0], one_by_one):
        out = student(pixels.double(), output_directions=True)
        loss = form(student_features(student, out, objective.settings), theirs, projections, objective.settings)
        found.append((loss, torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)))
    (new, new_gradients), (old, old_gradients) = found
    assert abs(new - old) < 1e-12
    for one, other in zip(new_gradients, old_gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", LAYER_WEIGHTS)
def test_weights_of_several_directions_are_those_of_each(form: str) -> None:
    cosines = torch.rand(5, 3, dtype=torch.float64) * 2 - 1
    together = layer_weights(cosines, form)
    for column, weights in zip(cosines.unbind(1), together.unbind(1), strict=True):
        assert torch.allclose(weights, layer_weights(column, form), rtol=1e-14)


@pytest.mark.parametrize("name", ["DeiT", "ViT"])
def test_under_autocast_the_teacher_says_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, pixels = teacher_of_images(name), image_batch()["pixel_values"]

    def signals() -> list[torch.Tensor]:
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
            found = teacher(pixels, with_attention=True)
        return [found.logits, found.feature, *found.tokens, *found.queries, *found.keys]

    def of_the_model_itself() -> list[torch.Tensor]:
        """Autocast casts every weight at every call, and what a norm writes for each product that reads it."""
        with monkeypatch.context() as patch:
            patch.setattr(teacher, "_network", lambda _: teacher.network)
            return signals()

    wide = teacher(pixels).logits
    assert teacher.narrow is None
    before = signals()
    assert all(torch.equal(new, old) for new, old in zip(before, of_the_model_itself(), strict=True))
    assert not torch.equal(before[0].float(), wide)
    copy = teacher.narrow
    signals()
    assert teacher.narrow is copy
    with torch.no_grad():
        teacher.network.blocks[1].attention.q_proj.weight.mul_(2)
    after = signals()  # of the weights as they are now
    assert not torch.equal(after[1], before[1])
    assert all(torch.equal(new, old) for new, old in zip(after, of_the_model_itself(), strict=True))


@needs_triton
def test_a_layer_of_plain_mamba_costs_few_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one more layer of student and teacher adds to a step. On a GPU each is a launch, of which a step is made.

    Begun twice, scanned and merged, with the gradients, 8; cosines and their gradient, 2; products 18 and 2 of all
    directions' gradients: two of in_proj, x_proj, dt_proj, the moves, out_proj, all directions; biases of in_proj and
    out_proj, 3; convolution, SiLU and norm with gradients, 6, and a copy; -exp(A_log) and twice the bias, with
    gradients, 6; B, C and the moves of all directions, with gradients, 5; gradients of what was cut in two or three, 3;
    sums where a tensor is read twice, 4, and the residual with its gradient, 2; zeros, 1. A block of the teacher:
    2 norms, 6 products, attention, GELU and 2 residuals, 12.
    """
    for op in ("selective_scan", "merge_scans", "residual_norm", "token_cosines"):
        monkeypatch.setattr(import_module(f"transmamba.ops.{op}"), "resolve_backend", lambda *_, **__: "triton")
    found = []
    for layers in (2, 3):
        torch.manual_seed(0)
        student = tiny_vision_model("plain_mamba", num_hidden_layers=layers, layers_with_local_conv=[])
        teacher, settings, batch = teacher_of_images(num_hidden_layers=layers), AdaptionLoss(), image_batch()
        projections = make_projections(student, teacher, batch["pixel_values"], settings)
        objective = AdaptionObjective(student, teacher, projections, settings)
        with Dispatched() as mode:
            objective(student, batch)[0].backward()
        found.append(mode.counts)
    more = found[1] - found[0]
    assert sum(more.values()) <= 8 + 2 + 18 + 2 + 3 + 7 + 6 + 5 + 3 + 6 + 1 + 12
    assert more["index_select"] == more["clone"] - 1 == more["stack"] == 0  # C, for all directions, is the one copy
