"""Subcloning: what a student takes of a wider or deeper teacher, which channels, and that indices are kept straight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from tests.conversion.checkpoints import tiny_source
from tests.conversion.vision_teachers import vision_teacher
from tests.helpers import relative_rms_error
from transmamba.conversion import RANKINGS, SubclonedPart, SubcloningPlan, convert, plan_subcloning, subclone
from transmamba.conversion.subcloning.depth import depth_map
from transmamba.conversion.subcloning.rankings import choose, rank
from transmamba.conversion.subcloning.table import check_cover
from transmamba.conversion.subcloning.teachers import open_teacher
from transmamba.errors import CheckpointError, InputError
from transmamba.models import vision_config

STUDENTS: dict[str, dict[str, Any]] = {
    "plain_mamba_tiny": {"hidden_size": 16, "num_hidden_layers": 3, "num_stem_convs": 1},
    "vim_tiny": {"hidden_size": 16, "num_hidden_layers": 6},
    "video_mamba_tiny": {"hidden_size": 16, "num_hidden_layers": 2},
    "vmamba_tiny": {"depths": [1, 2], "hidden_sizes": [16, 24], "patch_size": 4},
}


def student_config(name: str = "plain_mamba_tiny", **changes: Any) -> Any:
    common = {"image_size": 32, "patch_size": 8, "num_labels": 5, "state_size": 4}
    return vision_config(name, **(common | STUDENTS[name] | changes))


def row_of(plan: SubcloningPlan, target: str, number: int = 0) -> SubclonedPart:
    return [row for row in plan.subcloned if row.target == target][number]


def indices_of(plan: SubcloningPlan, row: SubclonedPart, dim: int, size: int) -> Tensor:
    name = row.indices[dim]
    return torch.arange(size) if name is None else torch.tensor(plan.index_sets[name])


# Specification, section 7, check 1.
@pytest.mark.parametrize("name", ["Llama", "Llama with a head of its own", "Qwen2", "Qwen3", "GPT-2"])
@pytest.mark.parametrize("ranking", ["uniform", "magnitude"])
def test_map_b_of_equal_size_is_the_teacher_bit_for_bit(name: str, ranking: str) -> None:
    source = tiny_source(name)
    exact, _ = convert(source, schedule=[0, 7, None])
    student, plan = subclone(source, exact.config, ranking=ranking)
    assert plan.index_sets == {}
    wanted, found = exact.state_dict(), student.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert {row.source for row in plan.subcloned} | {row.source for row in plan.ignored} == set(source.state_dict())


def test_map_a_of_equal_size_copies_bit_for_bit() -> None:
    teacher = vision_teacher("ViT")
    config = student_config("vim_tiny", hidden_size=24, num_hidden_layers=3, use_bias=True)
    student, plan = subclone(teacher, config, rescale=False)
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert torch.equal(ours["classifier.weight"], theirs["classifier.weight"])
    assert torch.equal(
        ours["backbone.patch_embed.proj.weight"], theirs["vit.embeddings.patch_embeddings.projection.weight"]
    )
    positions = theirs["vit.embeddings.position_embeddings"]
    assert torch.equal(ours["backbone.pos_embed"][:, 8], positions[:, 0])  # the class token stands in the middle
    assert torch.equal(ours["backbone.pos_embed"][:, [*range(8), *range(9, 17)]], positions[:, 1:])
    for layer in range(3):
        fc1, fc2 = (theirs[f"vit.layers.{layer}.mlp.{name}.weight"] for name in ("fc1", "fc2"))
        x, z = (torch.tensor(plan.index_sets[f"block {layer} {part}"]) for part in "xz")
        assert sorted([*x.tolist(), *z.tolist()]) == list(range(96))  # every neuron is used once
        mixer = f"backbone.layers.{layer}.mixer."
        assert torch.equal(ours[f"{mixer}in_proj.weight"], torch.cat([fc1[x], fc1[z]]))
        assert torch.equal(ours[f"{mixer}out_proj.weight"], fc2[:, x])
        assert torch.equal(ours[f"{mixer}in_proj.bias"][:48], theirs[f"vit.layers.{layer}.mlp.fc1.bias"][x])
        norm = theirs[f"vit.layers.{layer}.layernorm_after.weight"]
        assert torch.equal(ours[f"backbone.layers.{layer}.norm.weight"], norm)


# Specification, section 7, check 2.
@pytest.mark.parametrize("ranking", ["uniform", "magnitude"])
def test_a_selected_layer_is_the_teachers_with_other_channels_zero(ranking: str) -> None:
    teacher = vision_teacher().double()
    student, plan = subclone(teacher, student_config(), ranking=ranking, rescale=False)
    residual = torch.tensor(plan.index_sets["residual"])
    assert len(residual) == 16
    x = torch.randn(7, 24, dtype=torch.float64)
    others_zero = torch.zeros_like(x).index_copy(1, residual, x[:, residual])
    for place, stop in ((0, 32), (1, 64)):  # x, then the gate
        row = row_of(plan, "backbone.layers.1.mixer.in_proj.weight", place)
        bias = row_of(plan, "backbone.layers.1.mixer.in_proj.bias", place)
        values = {one.target: one.take(teacher.state_dict()[one.source], plan.index_sets) for one in (row, bias)}
        weight, shift = values.values()
        chosen = indices_of(plan, row, 0, 96)
        fc1 = teacher.deit.layers[1].mlp.fc1
        wanted = linear(others_zero, fc1.weight, fc1.bias)[:, chosen]
        # Sums of the same 16 products, and zeros, in another order: at most 24 roundings of fp64.
        assert relative_rms_error(linear(x[:, residual], weight, shift), wanted) < 24 * 2.0**-53
        assert relative_rms_error(linear(x[:, residual.roll(1)], weight, shift), wanted) > 0.1
        ours = student.state_dict()["backbone.layers.1.mixer.in_proj.weight"][stop - 32 : stop]
        assert torch.equal(ours, weight.float())


def test_the_residual_stream_is_one_everywhere() -> None:
    plan = plan_subcloning(vision_teacher(), student_config("vim_tiny", use_bias=True), ranking="magnitude")
    for row in plan.subcloned:
        width = [dim for dim, size in enumerate(row.shape) if size == 16]
        assert all(row.indices[dim] == "residual" for dim in width), row.target
    per_block = {name for name in plan.index_sets if name != "residual"}
    assert len(per_block) == 2 * 6


def test_rescaling_keeps_the_variance_of_outputs() -> None:
    teacher = vision_teacher(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_hidden_layers=1)
    config = student_config(hidden_size=48, num_hidden_layers=1)
    x = torch.randn(400, 192)
    exact = linear(x, teacher.deit.layers[0].mlp.fc1.weight)
    spread = {}
    for rescale in (True, False):
        student, plan = subclone(teacher, config, rescale=rescale)
        row = row_of(plan, "backbone.layers.0.mixer.in_proj.weight")
        assert row.scale == (2.0 if rescale else 1.0)  # sqrt(192 / 48)
        inputs = x[:, indices_of(plan, row, 1, 192)]
        ours = student.backbone.layers[0].mixer.in_proj.weight[:96].detach()
        spread[rescale] = float(linear(inputs, ours).std() / exact.detach().std())
    # The spread of 96 x 48 random weights is known to 1 / sqrt(2 x 96 x 48) = 1 %, and that of the inputs is alike.
    assert abs(spread[True] - 1) < 0.05
    assert abs(spread[False] - 0.5) < 0.025


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("teacher", ["ViT", "DeiT", "DeiT with two heads"])
def test_every_family_runs_and_every_row_is_used_once(name: str, teacher: str) -> None:
    source, config = vision_teacher(teacher), student_config(name)
    student, plan = subclone(source, config)
    check_cover(plan.rows, {key: tuple(value.shape) for key, value in student.named_parameters()})
    assert {row.source for row in plan.subcloned} | {row.source for row in plan.ignored} == set(source.state_dict())
    assert {row.source for row in plan.subcloned}.isdisjoint(row.source for row in plan.ignored)
    assert all(len(set(chosen)) == len(chosen) for chosen in plan.index_sets.values())
    assert 0 < plan.share_from_teacher < 1
    assert student(torch.randn(2, 3, 32, 32)).logits.isfinite().all()


def test_a_hole_or_an_overlap_in_the_table_is_seen() -> None:
    plan = plan_subcloning(vision_teacher(), student_config())
    shapes = {row.target: row.shape for row in plan if row.into is None}
    whole = [row for row in plan if row.into is None]
    check_cover(whole, shapes)
    for rows in (whole[1:], [*whole, whole[0]]):
        with pytest.raises(AssertionError):
            check_cover(rows, shapes)


def test_a_video_student_takes_the_patches_into_its_middle_frame() -> None:
    teacher = vision_teacher("ViT")
    config = student_config("video_mamba_tiny", num_frames=6, tubelet_size=3, hidden_size=24)
    student, _ = subclone(teacher, config)
    kernel = student.backbone.patch_embed.proj.weight
    assert torch.equal(kernel[:, :, 1], teacher.vit.embeddings.patch_embeddings.projection.weight)
    assert not kernel[:, :, [0, 2]].any()


def test_positions_follow_the_grid() -> None:
    config = student_config("vim_tiny", image_size=48, class_token="none")
    student, plan = subclone(vision_teacher(), config)
    row = row_of(plan, "backbone.pos_embed")
    assert row.positions is not None
    assert (row.positions.source_grid, row.positions.target_grid, row.positions.class_at) == ((4, 4), (6, 6), None)
    assert student.backbone.pos_embed.shape == (1, 36, 16)
    assert "backbone.cls_token" not in dict(student.named_parameters())


@pytest.mark.parametrize(
    ("mixer_source", "norm", "sources"),
    [
        ("mlp", "layernorm_after", ["mlp.fc1", "mlp.fc1"]),
        ("value", "layernorm_before", ["attention.v_proj", "mlp.fc1", "mlp.fc1"]),
        ("none", "layernorm_before", []),
    ],
)
def test_the_mixer_may_come_from_the_mlp_or_from_values(mixer_source: str, norm: str, sources: list[str]) -> None:
    plan = plan_subcloning(vision_teacher(), student_config(), mixer_source=mixer_source)
    rows = [row for row in plan.subcloned if row.target == "backbone.layers.0.mixer.in_proj.weight"]
    assert [row.source for row in rows] == [f"deit.layers.0.{name}.weight" for name in sources]
    assert row_of(plan, "backbone.layers.0.norm.weight").source == f"deit.layers.0.{norm}.weight"
    if mixer_source == "value":
        outs = [row for row in plan.subcloned if row.target == "backbone.layers.0.mixer.out_proj.weight"]
        assert [row.source for row in outs] == [f"deit.layers.0.{n}.weight" for n in ("attention.o_proj", "mlp.fc2")]
        assert [row.indices[1] for row in outs] == [row.indices[0] for row in rows[:2]]


def test_a_gate_of_its_own_and_an_identity_convolution() -> None:
    student, plan = subclone(vision_teacher(), student_config(), gate_source="none", convolution="identity")
    (gate,) = [row for row in plan.fresh if row.target == "backbone.layers.2.mixer.in_proj.weight"]
    assert gate.into is not None
    assert (gate.into.start, gate.into.stop) == (32, 64)
    kernel = student.backbone.layers[0].mixer.conv2d.weight
    assert torch.equal(kernel[:, 0, 3, 3], torch.ones(32))
    assert kernel.sum() == 32
    causal, _ = subclone(vision_teacher(), student_config("vim_tiny"), convolution="identity")
    assert torch.equal(causal.backbone.layers[1].mixer.conv1d_b.weight[:, 0, -1], torch.ones(32))


def test_stability_keeps_what_fine_tuning_left_alone() -> None:
    pretrained, teacher = vision_teacher(), vision_teacher()
    moved = torch.tensor([1, 4, 9, 11, 17, 18, 20, 23])
    with torch.no_grad():
        for layer in teacher.deit.layers:
            layer.mlp.fc1.weight[:, moved] += 0.3
            layer.mlp.fc2.weight[moved] += 0.3
    plan = plan_subcloning(teacher, student_config(), ranking="stability", pretrained=pretrained)
    assert set(plan.index_sets["residual"]) == set(range(24)) - set(moved.tolist())


def test_magnitude_drops_what_is_small() -> None:
    teacher = vision_teacher()
    small = [0, 2, 3, 5, 7, 13, 21, 22]
    with torch.no_grad():
        for layer in teacher.deit.layers:
            layer.mlp.fc1.weight[:, small] = 0
            layer.attention.o_proj.weight[small] = 0
            layer.mlp.fc1.bias[:64] = 0
            layer.mlp.fc1.weight[:64] *= 0.01
            layer.mlp.fc2.weight[:, :64] *= 0.01
    plan = plan_subcloning(teacher, student_config(), ranking="magnitude")
    assert set(plan.index_sets["residual"]) == set(range(24)) - set(small)
    assert plan.index_sets["block 1 x"] == tuple(range(64, 96))


def test_activation_keeps_what_is_active_on_the_calibration_images() -> None:
    teacher = vision_teacher()
    loud = [0, 1, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 18, 19, 22, 23]
    with torch.no_grad():
        teacher.deit.embeddings.position_embeddings[..., loud] += 50
    calibration = torch.randn(3, 3, 32, 32)
    plan = plan_subcloning(teacher, student_config(), ranking="activation", calibration=calibration)
    assert list(plan.index_sets["residual"]) == loud
    with torch.no_grad():
        teacher.deit.layers[0].mlp.fc1.bias[10:42] += 100
    plan = plan_subcloning(teacher, student_config(), ranking="activation", calibration=calibration)
    assert plan.index_sets["block 0 x"] == tuple(range(10, 42))


def test_activation_of_a_language_model_is_measured_on_tokens() -> None:
    source = tiny_source("Llama")
    config = convert(source)[0].config
    config.hidden_size = 16
    with torch.no_grad():
        source.model.embed_tokens.weight[:, 8:24] += 50
    plan = plan_subcloning(source, config, ranking="activation", calibration=torch.randint(257, (2, 9)))
    assert plan.index_sets["residual"] == tuple(range(8, 24))


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_map_b_takes_whole_heads_and_first_blocks(name: str) -> None:
    source = tiny_source(name)
    config = convert(source, schedule=[0, 7, None])[0].config
    size = config.head_dim
    config.hidden_size, config.num_hidden_layers, config.trans_points = 24, 2, [0, 7]
    config.num_key_value_heads = 1 if name == "Llama" else 2
    config.num_attention_heads = config.num_state_heads = 2
    config.rope_layers = None
    student, plan = subclone(source, config, rescale=False)
    assert plan.depth_map == (0, 1)
    keys = plan.index_sets["block 0 keys"]
    assert keys[:size] == tuple(range(keys[0], keys[0] + size))
    assert keys[0] % size == 0
    residual = torch.tensor(plan.index_sets["residual"])
    exact = convert(source)[0].state_dict()["model.layers.1.mixer.v_proj.weight"]
    found = student.state_dict()["model.layers.1.mixer.v_proj.weight"]
    assert torch.equal(found, exact[torch.tensor(plan.index_sets["block 1 keys"])][:, residual])
    assert student(input_ids=torch.randint(257, (2, 9))).logits.isfinite().all()


@pytest.mark.parametrize(
    ("teacher", "student", "found"),
    [
        (3, 3, (0, 1, 2)),
        (3, 6, (0, 0, 1, 1, 2, 2)),
        (5, 2, (0, 1)),
        (1, 1, (0,)),
    ],
)
def test_depths_are_matched(teacher: int, student: int, found: tuple[int, ...]) -> None:
    assert depth_map(teacher, student) == found


def test_a_layered_start_leaves_later_blocks_as_in_a_new_model() -> None:
    torch.manual_seed(3)
    student, plan = subclone(vision_teacher(), student_config(), early_layers=1)
    assert plan.depth_map == (0, None, None)
    torch.manual_seed(3)
    other, _ = subclone(vision_teacher(), student_config(), depth_map=[2, None, None])
    ours, theirs = student.state_dict(), other.state_dict()
    later = [name for name in ours if name.startswith(("backbone.layers.1", "backbone.layers.2"))]
    assert later
    assert all(torch.equal(ours[name], theirs[name]) for name in later)
    assert not torch.equal(ours["backbone.layers.0.norm.weight"], theirs["backbone.layers.0.norm.weight"])
    assert not [row for row in plan.subcloned if row.target.startswith("backbone.layers.1")]
    none = plan_subcloning(vision_teacher(), student_config(), early_layers=0)
    assert not [row for row in none.subcloned if ".layers." in row.target]


def test_choices_are_even_or_by_score() -> None:
    assert choose(None, 6, 3) == (1, 3, 5)
    assert choose(None, 7, 7) == tuple(range(7))
    assert choose(None, 1, 0) == ()
    assert choose(torch.tensor([0.0, 2.0, 2.0, 1.0, 2.0]), 5, 2) == (1, 2)  # of equals, the first
    assert choose(torch.tensor([0.0, 2.0, 2.0, 1.0, 2.0]), 5, 2, available=[0, 3, 4]) == (3, 4)


@pytest.mark.parametrize("ranking", ["magnitude", "activation", "stability"])
def test_every_dimension_has_a_score(ranking: str) -> None:
    teacher = open_teacher(vision_teacher())
    scores = rank(teacher, ranking, pretrained=vision_teacher("DeiT"), calibration=torch.randn(2, 3, 32, 32))
    assert {axis: len(score) for axis, score in scores.items()} == teacher.sizes
    assert all(score.isfinite().all() for score in scores.values())


def test_a_plan_is_json_and_text() -> None:
    plan = plan_subcloning(vision_teacher(), student_config())
    content = json.loads(plan.to_json())
    assert content["depth_map"] == [0, 1, 2]
    assert content["index_sets"]["residual"] == list(plan.index_sets["residual"])
    assert {row["kind"] for row in content["parameters"]} == {"copied", "subcloned", "fresh"}
    text = str(plan).splitlines()
    assert text[0] == "DeiTForImageClassification (deit) -> plain_mamba, ranking uniform"
    assert len(text) == 1 + len(plan) + len(plan.ignored)
    (line,) = [line for line in text if "layers.0.mixer.in_proj.weight[0:32]" in line]
    assert "deit.layers.0.mlp.fc1.weight[block 0 x, residual], x 1.225" in line


def test_a_teacher_may_be_a_folder(tmp_path: Path) -> None:
    teacher = vision_teacher()
    teacher.save_pretrained(tmp_path / "teacher")
    found, plan = subclone(tmp_path / "teacher", student_config())
    wanted, _ = subclone(teacher, student_config())
    assert plan.teacher == str(tmp_path / "teacher")
    name = "backbone.layers.2.mixer.out_proj.weight"
    assert torch.equal(found.state_dict()[name], wanted.state_dict()[name])


def test_the_teacher_is_left_as_it_was() -> None:
    teacher = vision_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student, _ = subclone(teacher, student_config(), ranking="activation", calibration=torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(teacher.state_dict()[name], before[name]) for name in before)
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_a_head_of_other_classes_is_fresh() -> None:
    plan = plan_subcloning(vision_teacher(), student_config(num_labels=7))
    assert [row.target for row in plan.fresh if row.target.startswith("classifier")] == [
        "classifier.weight",
        "classifier.bias",
    ]


def _wide() -> dict[str, Any]:
    return {"student_config": student_config(hidden_size=32)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_wide(), "the student is wider than its teacher: 32 of residual are wanted .* has 24; choose a student"),
        ({"ranking": "best"}, "ranking='best' is unknown; choose one of uniform"),
        ({"ranking": "stability"}, "give that as pretrained"),
        ({"ranking": "activation"}, "give some as calibration"),
        (
            {"ranking": "stability", "pretrained": vision_teacher(hidden_size=36, intermediate_size=144)},
            "pretrained has a width of 36 and the teacher 24",
        ),
        ({"student_config": student_config(num_hidden_layers=4)}, "4 blocks, which is no multiple of the teacher's 3"),
        ({"depth_map": [0, 1]}, "depth_map has 2 entries and the student 3"),
        ({"depth_map": [0, 1, 3]}, r"depth_map\[2\]=3 is no block of the teacher, which has 3"),
        ({"early_layers": 4}, "early_layers=4 must be between 0 and the student's 3"),
        ({"mixer_source": "attention"}, "mixer_source='attention' is unknown; choose one of mlp, value, none"),
        ({"gate_source": "z"}, "gate_source='z' is unknown"),
        ({"convolution": "zero"}, "convolution='zero' is unknown"),
        ({"teacher": tiny_source("GPT-2")}, "is a gpt2 and the student a plain_mamba; its teacher must be a ViT"),
        ({"student_config": vision_teacher().config}, "a DeiTConfig is no student"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_what_does_not_fit_is_one_line(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"teacher": vision_teacher(), "student_config": student_config()} | arguments
    with pytest.raises(InputError, match=message) as caught:
        plan_subcloning(given.pop("teacher"), given.pop("student_config"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "vocab_size is 300; it must be the teacher's 257"),
        ({"head_dim": 4}, "head_dim is 4; it must be the teacher's 8"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4; it must be between 1 and the teacher's 2"),
        ({"intermediate_size": 64}, "intermediate_size is 64; it must be between 1 and the teacher's 48"),
        ({"tie_word_embeddings": False}, "set it to True"),
        ({"norm_type": "rms", "mlp_gated": False}, r"no place for the teacher's model\.layers\.0\.mlp\.gate_proj"),
    ],
)
def test_a_language_student_that_does_not_fit_is_one_line(changes: dict[str, Any], message: str) -> None:
    source = tiny_source("Llama")
    config = convert(source)[0].config
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=message):
        plan_subcloning(source, config)


def test_a_teacher_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = student_config()
    model: PreTrainedModel = subclone(vision_teacher(), config)[0]
    with pytest.raises(CheckpointError, match="family 'plain_mamba', which is not subcloned; known: vit, deit, bert"):
        plan_subcloning(model, config)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="family 'plain_mamba'"):
        plan_subcloning(tmp_path / "model", config)


def test_rankings_are_named() -> None:
    assert list(RANKINGS) == ["uniform", "magnitude", "activation", "stability"]
