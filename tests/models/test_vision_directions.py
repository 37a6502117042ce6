"""Directions are readable before they are merged, in the order of their scan, and are what the layer merges."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.helpers import relative_rms_error
from tests.models.vision_models import SMALL, images, tiny_vision_model
from transmamba.modules.scan_orders import scan_order

FP32_BOUND = 1e-5
NAMES = {
    "plain_mamba": ["snake", "snake_reversed", "snake_transposed", "snake_transposed_reversed"],
    "vim": ["raster", "raster_reversed"],
    "vmamba": ["raster", "transposed", "raster_reversed", "transposed_reversed"],
    "video_mamba": ["raster", "raster_reversed"],
    "video_mamba of videos": ["spatial_first", "spatial_first_reversed"],
}


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_every_layer_gives_its_directions_in_their_order(family: str) -> None:
    model, x = tiny_vision_model(family), images(family)
    out = model(x, output_directions=True)
    assert model(x).directions is None
    assert len(out.directions) == model.config.num_hidden_layers
    for layer in out.directions:
        assert [direction.name for direction in layer] == NAMES[family]
        for direction in layer:
            order = scan_order(direction.name, direction.grid, x.device).order
            assert torch.equal(direction.patches[direction.patches >= 0], order)
            assert direction.features.shape[:2] == (2, len(direction.patches))


def mixer_and_norm(model: torch.nn.Module, family: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    if family == "vmamba":
        block = model.backbone.stages[0].blocks[0]
        return block.mixer, block.norm1
    layer = model.backbone.layers[0]
    return layer.mixer, layer.norm


@pytest.mark.parametrize("family", ["plain_mamba", "vim", "vmamba", "video_mamba"])
@torch.no_grad()
def test_merging_the_directions_gives_the_output_of_the_mixer(family: str) -> None:
    model, x = tiny_vision_model(family), images(family)
    out = model(x, output_directions=True, output_hidden_states=True)
    mixer, norm = mixer_and_norm(model, family)
    first = out.hidden_states[0]
    directions = out.directions[0]
    hidden = norm(first)
    if family == "plain_mamba":
        merged = sum(direction.in_raster_order() for direction in directions)
        z = mixer.in_proj(hidden).chunk(2, dim=-1)[1]
        expected, found = mixer.out_proj(merged * silu(z)), mixer(hidden, directions[0].grid)[0]
    elif family == "vmamba":
        merged = sum(direction.in_raster_order() for direction in directions)
        image = hidden.unflatten(1, directions[0].grid)
        expected = mixer.out_proj(mixer.out_norm(merged)).unflatten(1, directions[0].grid)
        found = mixer(image)[0]
    else:
        merged = directions[0].features + directions[1].features.flip(1)
        expected = mixer.out_proj(merged / 2 if family == "vim" else merged)
        found = mixer(hidden)[0]
    assert relative_rms_error(found, expected) < FP32_BOUND


@pytest.mark.parametrize("direction", [0, 1])
@torch.no_grad()
def test_a_direction_sees_what_it_has_visited_and_no_more(direction: int) -> None:
    """The token in the middle of the scan changes what follows it in that scan, and nothing before."""
    mixer = tiny_vision_model("vim").backbone.layers[0].mixer
    hidden = torch.randn(1, 11, 16, device=mixer.D.device)
    changed = hidden.clone()
    changed[:, 5] += 1
    before, after = (mixer(x)[1][direction] for x in (hidden, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(dim=-1).any()


@torch.no_grad()
def test_a_reversed_image_swaps_directions_of_equal_parameters() -> None:
    mixer = tiny_vision_model("vim").backbone.layers[0].mixer
    mixer.A_b_log.copy_(mixer.A_log)
    mixer.D_b.copy_(mixer.D)
    for name in ("conv1d", "x_proj", "dt_proj"):
        getattr(mixer, f"{name}_b").load_state_dict(getattr(mixer, name).state_dict())
    hidden = torch.randn(2, 9, 16, device=mixer.D.device)
    forward, backward = mixer(hidden)[1]
    forward_of_reversed, backward_of_reversed = mixer(hidden.flip(1))[1]
    assert relative_rms_error(forward_of_reversed, backward) < FP32_BOUND
    assert relative_rms_error(backward_of_reversed, forward) < FP32_BOUND
    assert relative_rms_error(forward, backward) > 0.1


@pytest.mark.parametrize("order", ["transposed", "snake", "diagonal_reversed"])
@torch.no_grad()
def test_vim_in_another_order_is_vim_of_rearranged_patches(order: str) -> None:
    model, x = tiny_vision_model("vim", scan_order=order), images("vim")
    plain = tiny_vision_model("vim")
    arranged = scan_order(order, (4, 4), x.device)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # b, patches, c, 8, 8
    moved = arranged.scan(patches, 1).unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    positions = plain.backbone.pos_embed
    token = positions[:, 8:9]
    others = torch.cat([positions[:, :8], positions[:, 9:]], dim=1)
    others = arranged.scan(others, 1)
    positions.copy_(torch.cat([others[:, :8], token, others[:, 8:]], dim=1))
    assert relative_rms_error(model(x).logits, plain(moved).logits) < FP32_BOUND


@torch.no_grad()
def test_a_video_may_be_scanned_time_first() -> None:
    family = "video_mamba of videos"
    model, x = tiny_vision_model(family, scan_order="temporal_first"), images(family)
    out = model(x, output_directions=True)
    forward, backward = out.directions[0]
    assert (forward.name, backward.name) == ("temporal_first", "temporal_first_reversed")
    assert forward.patches.tolist()[:4] == [-1, 0, 16, 1]
    assert not torch.allclose(out.logits, tiny_vision_model(family)(x).logits)


def test_gradients_reach_everything_through_one_direction(  # what a distillation loss on directions relies on
) -> None:
    for family in SMALL:
        model, x = tiny_vision_model(family), images(family)
        directions = model(x, output_directions=True).directions
        sum(_score(direction.features) for direction in directions[-1]).backward()
        untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        last = [name for name in untouched if "out_proj" not in name and "norm" not in name and "mlp" not in name]
        assert all(name.startswith("classifier") for name in last), last


def _score(features: Tensor) -> Tensor:
    return features.square().mean()
