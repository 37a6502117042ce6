"""The teacher's tokens in the order of each scan: which token meets which, and where the class token goes."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, layer_norm

from tests.distillation.image_pairs import image_batch, teacher_of_images
from tests.models.vision_models import images, tiny_vision_model
from transmamba.distillation import direction_cosine, target_layer, teacher_in_order
from transmamba.errors import InputError
from transmamba.modules import DirectionOutput, scan_order, scan_order_names

GRID = (3, 5)
ROUNDING = 40 * 2.0**-52  # of a mean of 30 cosines of 7 numbers, fp64, each with some ten roundings


def direction(name: str, features: Tensor | None = None, *, token_at: int | None = None) -> DirectionOutput:
    patches = scan_order(name, GRID).order
    if token_at is not None:
        patches = torch.cat([patches[:token_at], torch.tensor([-1]), patches[token_at:]])
    features = torch.zeros(2, len(patches), 7, dtype=torch.float64) if features is None else features
    return DirectionOutput(name=name, features=features, patches=patches, grid=GRID)


def numbered(others: int) -> Tensor:
    """Tokens that say which they are: -1, -2 for those before the patches, then 0, 1, ... for the patches."""
    numbers = torch.cat([-1.0 - torch.arange(others), torch.arange(15.0)])
    return numbers[None, :, None].expand(2, -1, 7).double()


@pytest.mark.parametrize("name", scan_order_names(2))
@pytest.mark.parametrize("others", [1, 2])
def test_a_step_meets_the_patch_that_it_visits(name: str, others: int) -> None:
    wanted, steps = teacher_in_order(numbered(others), others, GRID, direction(name))
    assert wanted[1, :, 3].tolist() == scan_order(name, GRID).order.tolist()
    assert steps.tolist() == list(range(15))


@pytest.mark.parametrize("name", ["raster", "raster_reversed", "snake_transposed"])
def test_the_class_token_is_moved_to_the_students_or_left_out(name: str) -> None:
    order = scan_order(name, GRID).order.tolist()
    scan = direction(name, token_at=7)
    moved, steps = teacher_in_order(numbered(2), 2, GRID, scan)
    assert moved[0, :, 0].tolist() == [*order[:7], -1, *order[7:]]
    assert steps.tolist() == list(range(16))
    left, steps = teacher_in_order(numbered(2), 2, GRID, scan, class_token="leave")
    assert left[0, :, 0].tolist() == order
    assert steps.tolist() == [*range(7), *range(8, 16)]


def cosine(student: Tensor, teacher: Tensor, name: str) -> float:
    wanted, _ = teacher_in_order(teacher, 0, GRID, direction(name))
    return direction_cosine(student, wanted).item()


# Specification, section 7, check 4.
def test_permuting_one_side_lowers_the_cosine_and_permuting_both_does_not() -> None:
    teacher = torch.randn(2, 15, 7, dtype=torch.float64)
    student = teacher + 0.5 * torch.randn_like(teacher)
    together = direction_cosine(student, teacher).item()
    shuffled = torch.randperm(15)
    assert direction_cosine(student, teacher[:, shuffled]).item() < together - 0.2
    assert direction_cosine(student[:, shuffled], teacher[:, shuffled]).item() == pytest.approx(together, abs=ROUNDING)
    pooled = [direction_cosine(student.mean(1, True), x.mean(1, True)).item() for x in (teacher, teacher[:, shuffled])]
    assert pooled[0] == pytest.approx(pooled[1], abs=1e-12)  # a loss on means would not see the order at all


# Specification, section 7, check 5.
@pytest.mark.parametrize("name", scan_order_names(2))
def test_scan_order_against_the_ordered_teacher_is_raster_against_the_plain_one(name: str) -> None:
    teacher = torch.randn(2, 15, 7, dtype=torch.float64)
    raster = teacher + 0.5 * torch.randn_like(teacher)
    in_scan_order = scan_order(name, GRID).scan(raster, 1)
    assert cosine(in_scan_order, teacher, name) == pytest.approx(cosine(raster, teacher, "raster"), abs=ROUNDING)
    if name != "raster":
        assert cosine(in_scan_order, teacher, "raster") < cosine(raster, teacher, "raster") - 0.1


# Specification, section 7, check 3, of one direction.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_teacher_is_at_a_cosine_of_1_to_itself(dtype: torch.dtype) -> None:
    teacher = torch.randn(2, 15, 7).to(dtype)
    # Layer norm and cosine are fp32 for 16-bit inputs: a few roundings of a number near 1, and layer norm's epsilon.
    assert direction_cosine(3 * teacher + 1, teacher).item() == pytest.approx(
        1, abs=1e-2 if dtype is torch.bfloat16 else 1e-6
    )
    assert direction_cosine(-teacher, teacher).item() == pytest.approx(-1, abs=1e-6)


def test_the_cosine_and_its_gradients_are_those_of_autograd() -> None:
    student, teacher = (torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(direction_cosine, (student, teacher))
    wanted = cosine_similarity(layer_norm(student, (7,)), layer_norm(teacher, (7,)), dim=-1).mean()
    assert abs(direction_cosine(student, teacher) - wanted) < ROUNDING
    nothing = torch.zeros(1, 5, 7)
    assert direction_cosine(nothing, torch.randn(1, 5, 7)) == 0


@pytest.mark.parametrize("family", ["plain_mamba", "vim", "video_mamba"])
def test_students_and_teachers_number_patches_alike(family: str) -> None:
    """A patch that is changed in the image is the patch whose token changes most, in teacher and student."""
    student, teacher = tiny_vision_model(family), teacher_of_images(num_hidden_layers=1)
    x = image_batch(1)["pixel_values"]
    changed = x.clone()
    changed[..., 16:24, 8:16] += 3  # row 2, column 1 of 4 x 4 patches
    before, after = (teacher(pixels).tokens[0] for pixels in (x, changed))
    student_before, student_after = (student(pixels, output_directions=True).directions[0] for pixels in (x, changed))
    for scan, scan_after in zip(student_before, student_after, strict=True):
        theirs = [teacher_in_order(tokens, 2, (4, 4), scan)[0] for tokens in (before, after)]
        step = (theirs[1] - theirs[0]).norm(dim=-1).argmax().item()
        assert scan.patches[step] == 9
        if family != "plain_mamba":  # whose convolution spreads a patch over its neighbours
            changes = (scan_after.features - scan.features).norm(dim=-1)[0]
            assert (changes > 0).nonzero()[0] == step  # a scan sees the patch from then on


def test_a_pyramid_is_compared_on_its_own_grid() -> None:
    scan = tiny_vision_model("vmamba")(images("vmamba"), output_directions=True).directions[0][1]
    assert scan.grid == (8, 8)
    tokens = torch.cat([torch.zeros(2, 1, 24), torch.ones(2, 16, 24) * 3], dim=1)
    wanted, _ = teacher_in_order(tokens, 1, (4, 4), scan)
    assert torch.allclose(wanted, torch.full((2, 64, 24), 3.0))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (3, 3, [0, 1, 2]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (5, 2, [0, 0, 1, 1, 1]),
        (2, 5, [2, 4]),  # round(2.5), round(5), from 1
        (4, 12, [2, 5, 8, 11]),
        (1, 1, [0]),
    ],
)
def test_layers_are_compared_at_the_same_share_of_the_depth(student: int, teacher: int, expected: list[int]) -> None:
    assert [target_layer(i, student, teacher) for i in range(student)] == expected
    assert {target_layer(i, student, teacher, target="final") for i in range(student)} == {teacher - 1}


def test_what_does_not_fit_is_one_line() -> None:
    x = images("video_mamba of videos")
    video = tiny_vision_model("video_mamba of videos")(x, output_directions=True).directions[0][0]
    with pytest.raises(InputError, match="scans a video of 2 x 4 x 4 patches and the teacher an image"):
        teacher_in_order(numbered(1), 1, GRID, video)
    with pytest.raises(InputError, match="class_token='first' is unknown; choose 'move' or 'leave'"):
        teacher_in_order(numbered(1), 1, GRID, direction("raster"), class_token="first")
    with pytest.raises(InputError, match="target='same' is unknown"):
        target_layer(0, 1, 1, target="same")
