"""Vision backbones: saving, any size, features and maps, checkpointing, drop path, labels, initial values."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
)

from tests.helpers import relative_rms_error
from tests.models.vision_models import SMALL, images, tiny_vision_model
from transmamba.errors import InputError
from transmamba.models import VISION_PRESETS, split_tokens, vision_config, vision_model
from transmamba.models.initial_values import find_initial_value

FAMILIES = list(SMALL)
FP32_BOUND = 1e-5  # a hundred roundings of 2^-24 in each of the few layers


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_a_saved_model_comes_back_by_the_auto_classes(tmp_path: Path, family: str) -> None:
    model, x = tiny_vision_model(family), images(family)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    auto = AutoModelForVideoClassification if "videos" in family else AutoModelForImageClassification
    loaded = auto.from_pretrained(tmp_path).to(x.device).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(x).logits, model(x).logits)
    backbone = AutoModel.from_pretrained(tmp_path).to(x.device).eval()
    assert torch.equal(backbone(x).pooler_output, model(x).pooler_output)


def test_a_config_is_the_same_after_a_round_trip(tmp_path: Path, family: str) -> None:
    config = tiny_vision_model(family).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert json.loads(loaded.to_json_string()) == json.loads((tmp_path / "config.json").read_text())


@torch.no_grad()
def test_features_states_and_maps_belong_together(family: str) -> None:
    model, x = tiny_vision_model(family), images(family)
    out = model(x, output_hidden_states=True)
    assert torch.equal(model.forward_features(x), out.last_hidden_state)
    assert torch.equal(model.backbone.pool(out.last_hidden_state), out.pooler_output)
    assert torch.equal(model.classifier(out.pooler_output), out.logits)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert model(x).hidden_states is None
    maps = model.feature_maps(x)
    if family == "vmamba":
        assert [tuple(m.shape[1:]) for m in maps] == [(16, 8, 8), (24, 4, 4)]
        assert torch.equal(maps[-1].flatten(2).transpose(1, 2), out.last_hidden_state)
        return
    _, patches = split_tokens(out.last_hidden_state, model.backbone.sequence_patches(x))
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), patches)
    assert len(model.feature_maps(x, [0, -1])) == 2
    _, first = split_tokens(out.hidden_states[1], model.backbone.sequence_patches(x))
    assert torch.equal(model.feature_maps(x, [0])[0].flatten(2).transpose(1, 2), first)
    assert maps[-1].shape[-2:] == (4, 4)


@torch.no_grad()
def test_a_layer_that_is_not_there_is_refused(family: str) -> None:
    with pytest.raises(InputError, match="there is no layer 7; this model has"):
        tiny_vision_model(family).feature_maps(images(family), [7])


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(32, 48), (41, 8), (24, 33)])
def test_images_of_any_size_run(family: str, height: int, width: int) -> None:
    model, x = tiny_vision_model(family), images(family, height=height, width=width)
    out = model(x, output_directions=True)
    assert torch.isfinite(out.logits).all()
    grid = out.directions[0][0].grid
    assert grid[-2] in (height // 8, math.ceil(height / 8), math.ceil(height / 4))
    for layer in out.directions:
        for direction in layer:
            assert direction.in_raster_order().shape[1] == math.prod(direction.grid)


@torch.no_grad()
def test_rows_of_a_batch_do_not_touch_each_other(family: str) -> None:
    model, x = tiny_vision_model(family), images(family, batch=3)
    together = model(x).logits
    alone = torch.cat([model(row[None]).logits for row in x])
    assert relative_rms_error(together, alone) < FP32_BOUND
    assert relative_rms_error(together[:1], alone[1:2]) > 1e-3
    assert model(x[:0]).logits.shape == (0, 5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, x = tiny_vision_model(family).train(), images(family)
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model(x, labels=torch.tensor([1, 4], device=x.device), output_directions=True)
        (out.loss + out.directions[0][0].features.square().mean()).backward()
        parameters = dict(model.named_parameters())
        assert all(parameter.grad is not None for parameter in parameters.values())
        gradients.append({name: parameter.grad for name, parameter in parameters.items()})
        buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}
        assert all(int(count) == 1 for count in buffers.values())
    for name, exact in gradients[0].items():
        assert relative_rms_error(gradients[1][name], exact) < FP32_BOUND, name


def test_drop_path_leaves_out_branches_in_training_only(family: str) -> None:
    model, x = tiny_vision_model(family, drop_path_rate=0.9), images(family)
    with torch.no_grad():
        assert torch.equal(model(x).logits, tiny_vision_model(family)(x).logits)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0
        model.train()
        assert not torch.equal(model(x).logits, model(x).logits)


@torch.no_grad()
def test_sixteen_bits_run_and_stay_near(family: str) -> None:
    exact = tiny_vision_model(family)(images(family)).logits
    model, x = tiny_vision_model(family, torch.bfloat16), images(family, dtype=torch.bfloat16)
    out = model(x, output_hidden_states=True)
    assert out.logits.dtype == torch.bfloat16
    assert relative_rms_error(out.logits, exact) < 0.1
    keeps = getattr(model.config, "residual_in_fp32", False)
    assert out.hidden_states[-1].dtype == (torch.float32 if keeps else torch.bfloat16)


def test_autocast_runs(family: str) -> None:
    model, x = tiny_vision_model(family).train(), images(family)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        loss = model(x, labels=torch.tensor([0, 1], device=x.device)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@torch.no_grad()
def test_hard_and_soft_labels_have_the_same_loss() -> None:
    model, x = tiny_vision_model("vim"), images("vim")
    labels = torch.tensor([3, 0], device=x.device)
    hard = model(x, labels=labels)
    soft = model(x, labels=torch.nn.functional.one_hot(labels, 5).float()).loss
    expected = -hard.logits.log_softmax(-1)[torch.arange(2), labels].mean()
    assert hard.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert soft.item() == pytest.approx(hard.loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([5, 0]), "labels go from 0 to 5 and the model has 5 classes"),
        (torch.tensor([-1, 0]), "labels go from -1 to 0"),
        (torch.zeros(3, dtype=torch.long), r"labels have shape \(3,\)"),
        (torch.zeros(2, 4), r"give \(2,\) whole numbers, or \(2, 5\) probabilities"),
    ],
    ids=str,
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor, message: str) -> None:
    if "go from" in message and images("vim").is_cuda:
        pytest.skip("values are not read on an accelerator")
    with pytest.raises(InputError, match=message):
        tiny_vision_model("vim")(images("vim"), labels=labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: None, "there are no pixel_values; give"),
        (lambda x: x[0], "pixel_values has shape"),
        (lambda x: x.long(), "torch.int64; normalise"),
        (lambda x: x[..., :2, :, :], "2 channels and this model was built for 3"),
        (lambda x: x * float("nan"), "last_hidden_state holds NaN"),
    ],
    ids=["none", "a dimension less", "integers", "a channel less", "nan"],
)
def test_pixels_that_do_not_fit_are_refused(family: str, change: object, message: str) -> None:
    x = images(family)
    if "NaN" in message and x.is_cuda:
        pytest.skip("values are not read on an accelerator")
    with pytest.raises(InputError, match=message) as caught:
        tiny_vision_model(family)(change(x))  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_images_smaller_than_a_patch_are_refused() -> None:
    for family in ("vim", "video_mamba", "video_mamba of videos"):
        with pytest.raises(InputError, match="images of 32 x 7 pixels hold no whole patch; give at least 8 x 8"):
            tiny_vision_model(family)(images(family, width=7))
    with pytest.raises(InputError, match="videos of 1 frames hold no whole tubelet; give at least 2"):
        tiny_vision_model("video_mamba of videos")(images("video_mamba of videos")[:, :1])
    assert tiny_vision_model("plain_mamba")(images("plain_mamba", height=1, width=1)).logits.shape == (2, 5)


def test_videos_of_any_number_of_frames_run() -> None:
    model, x = tiny_vision_model("video_mamba of videos"), images("video_mamba of videos")
    torch.nn.init.normal_(model.backbone.temporal_pos_embedding)
    longer = torch.cat([x, x, x[:, :1]], dim=1)
    assert model(longer).last_hidden_state.shape[1] == 1 + 4 * 16
    assert model(longer[:, :8]).last_hidden_state.shape == model(longer).last_hidden_state.shape


PUBLISHED_MILLIONS = {  # of the papers and repositories, with 1,000 classes
    "plain_mamba_l1": 7.3,
    "plain_mamba_l2": 25.7,
    "plain_mamba_l3": 50.5,
    "vim_tiny": 7,
    "vim_small": 26,
    "vim_base": 98,
    "vmamba_tiny": 30,
    "vmamba_small": 50,
    "vmamba_base": 89,
    "video_mamba_tiny": 7,
    "video_mamba_small": 26,
    "video_mamba_middle": 74,
}


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_published_sizes_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = vision_model(name, num_labels=1000)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if name in PUBLISHED_MILLIONS:
        head = model.classifier.weight.numel() / 1e6  # PlainMamba's table leaves it out
        expected = PUBLISHED_MILLIONS[name] + (head if name.startswith("plain") else 0)
        assert abs(millions - expected) < max(0.5, 0.01 * expected)
    else:
        # The 12 blocks hold 54 to 61 % of the Transformer's of that width, which is 12 (12 d^2 + 13 d).
        width = model.config.hidden_size
        blocks = sum(parameter.numel() for parameter in model.backbone.layers.parameters())
        assert 0.53 < blocks / (12 * (12 * width**2 + 13 * width)) < 0.62
    assert model.config.drop_path_rate < 1


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="no vision model 'vim_huge'; choose one of plain_mamba_tiny, "):
        vision_model("vim_huge")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vim_tiny", {"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ("vim_tiny", {"image_size": [32]}, r"image_size=\[32\] must be a whole number, or \[height, width\]"),
        ("vim_tiny", {"image_size": 8}, "image_size=8 holds no patch of 16 x 16"),
        ("vim_tiny", {"class_token": "last"}, "class_token='last' is unknown; choose 'middle' or 'first' or 'none'"),
        ("vim_tiny", {"scan_order": "temporal_first"}, "scan_order='temporal_first' is unknown"),
        ("vim_tiny", {"drop_path_rate": 1.0}, "drop_path_rate=1.0 must be at least 0 and less than 1"),
        ("plain_mamba_tiny", {"patch_size": 7}, "patch_size=7 must be even"),
        ("plain_mamba_tiny", {"conv_kernel": 4}, "conv_kernel=4 must be odd; try 5"),
        ("plain_mamba_tiny", {"scan_orders": []}, "scan_orders is empty"),
        ("plain_mamba_tiny", {"scan_orders": ["raster"]}, "scan_orders='raster' is unknown; choose 'snake'"),
        ("plain_mamba_tiny", {"layers_with_local_conv": [12]}, "names layer 12 of 12"),
        ("vmamba_tiny", {"depths": [1, 2]}, "must have one entry for each stage"),
        ("vmamba_tiny", {"depths": [0, 1, 1, 1]}, "must be at least 1 throughout"),
        ("vmamba_tiny", {"expand": 0.0}, "expand=0.0 must be > 0"),
        ("vmamba_tiny", {"downsampling": "pool"}, "downsampling='pool' is unknown; choose 'conv3'"),
        ("vmamba_tiny", {"patch_size": 5}, "patch_size=5 and hidden_sizes"),
        ("video_mamba_tiny", {"num_frames": 5, "tubelet_size": 2}, "num_frames=5 must be a multiple of tubelet_size=2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        vision_config(name, **fields)
    assert "\n" not in str(caught.value)


WIDE: dict[str, dict] = {
    "plain_mamba": {"hidden_size": 128, "num_hidden_layers": 4},
    "vim": {"hidden_size": 128, "num_hidden_layers": 4, "use_bias": True},
    "vmamba": {"depths": [4, 4], "hidden_sizes": [64, 128], "use_bias": True, "conv_bias": True},
    "video_mamba": {"hidden_size": 128, "num_hidden_layers": 4, "use_bias": True},
    "video_mamba of videos": {"hidden_size": 128, "num_hidden_layers": 4},
}


def test_every_parameter_is_drawn_as_its_row_says(family: str) -> None:
    model = tiny_vision_model(family, **WIDE[family], num_labels=60)
    table = model.initial_values(model.config)
    pooled: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        pooled.setdefault(find_initial_value(table, name).ending, []).append(parameter.detach())
    rows = {row.ending: row for row in reversed(table)}
    for ending, parameters in pooled.items():
        row = rows[ending]
        values = torch.cat([parameter.flatten() for parameter in parameters]).double().cpu()
        slack = 6 * len(values) ** -0.5
        if row.distribution == "constant":
            assert (values == row.a).all(), row
        elif row.distribution == "uniform":
            assert values.abs().max() <= row.b, row
            assert abs(values.std().item() / (row.b / 3**0.5) - 1) < slack, row
        elif row.distribution == "truncated_normal":
            assert values.abs().max() <= 2 * row.a, row
            assert abs(values.std().item() / (0.8796 * row.a) - 1) < slack, row  # of a normal cut at two deviations
        elif row.distribution == "log_counting":
            counted = torch.arange(1.0, parameters[0].shape[-1] + 1, device=parameters[0].device)
            assert torch.allclose(parameters[0].exp(), counted.expand_as(parameters[0])), row
        else:
            steps = softplus(values / row.scale).log()
            assert row.distribution == "inverse_softplus_log_uniform"
            assert math.log(row.a) - 1e-4 <= steps.min() <= steps.max() <= math.log(row.b) + 1e-4, row
            assert abs(steps.mean().item() - math.log(row.a * row.b) / 2) < slack * math.log(row.b / row.a), row


def test_the_steps_of_plain_mamba_begin_where_mamba_1_begins() -> None:
    mixer = tiny_vision_model("plain_mamba", hidden_size=128).backbone.layers[0].mixer
    steps = softplus(2 * mixer.dt_proj.bias.detach().double())  # the projection and the scan both add it
    assert 0.001 - 1e-6 <= steps.min() <= steps.max() <= 0.1 + 1e-6
