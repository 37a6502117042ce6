"""The teacher's tokens in the order of a student's scan, and how near the student's features are to them.

Letters: m a direction, i a layer of the student, t a step of the scan, pi_m(t) the raster index of the patch visited
there. With Y the student's features of direction m in scan order, before the directions are merged,

    c_im = mean over t of cos( P(Y_im[t]), T_g(i)[pi_m(t)] )

Means over patches do not change when the order does, so the comparison is token by token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from transmamba.errors import InputError
from transmamba.modules import DirectionOutput
from transmamba.modules.scan_orders import TOKEN_WITHOUT_PATCH
from transmamba.ops.token_cosines import Cosine, standardised

CLASS_TOKENS = ("move", "leave")


def teacher_in_order(
    tokens: Tensor,
    num_others: int,
    grid: Sequence[int],
    direction: DirectionOutput,
    *,
    class_token: str = "move",
) -> tuple[Tensor, Tensor]:
    """The teacher's tokens, (..., steps, hidden_size), in the order of a scan, and the steps of the scan they are of.

    tokens (..., num_others + patches, hidden_size), patches in raster order over grid. Where the student has a class
    token, the teacher's is moved there ("move"), or that step is left out ("leave"). On another grid than the
    student's, the teacher's patches are resized, bilinearly.

    Raises:
        InputError: the student scans a video.
    """
    if class_token not in CLASS_TOKENS:
        raise InputError(f"class_token={class_token!r} is unknown; choose {' or '.join(map(repr, CLASS_TOKENS))}.")
    patches = _on_grid(tokens[..., num_others:, :], grid, direction.grid)
    count = direction.grid[0] * direction.grid[1]
    if count == len(direction.patches):
        return patches.index_select(-2, direction.patches), torch.arange(count, device=tokens.device)
    if class_token == "leave":
        steps = _steps_of_patches(direction.patches, count)
        return patches.index_select(-2, direction.patches[steps]), steps
    both = torch.cat([tokens[..., :1, :], patches], dim=-2)
    return both.index_select(-2, direction.patches + 1), torch.arange(len(direction.patches), device=tokens.device)


def direction_cosine(student: Tensor, teacher: Tensor, inside: Tensor | None = None) -> Tensor:
    """Return c: the mean over tokens and batch of the cosine of standardised features; both (..., batch, steps, width).

    The result has the leading dimensions, such as layers.

    inside (batch, steps), bool: the tokens that count; None = all.

    Standardised: layer norm without parameters, so that neither a mean nor a scale of the features counts. fp32, or
    fp64 for fp64 inputs.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    cosines = Cosine.apply(student, standardised(teacher.to(dtype)))
    if inside is None:
        return cosines.mean(dim=(-2, -1))
    return torch.where(inside, cosines, 0.0).sum(dim=(-2, -1)) / inside.sum().clamp(min=1)


def target_layer(layer: int, student_layers: int, teacher_layers: int, *, target: str = "mapped") -> int:
    """g(i): the block of the teacher, from 0, that a layer of the student, from 0, is compared with.

    "mapped": the block at the same share of the depth; in a deeper student, each block serves several layers in a row.
    "final": the last block.
    """
    if target == "final":
        return teacher_layers - 1
    if target != "mapped":
        raise InputError(f"target={target!r} is unknown; choose 'mapped' or 'final'.")
    share = (layer + 1) * teacher_layers
    if student_layers > teacher_layers:
        return -(-share // student_layers) - 1
    return (2 * share + student_layers) // (2 * student_layers) - 1


def tokens_on_grid(tokens: Tensor, num_others: int, grid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """A teacher's tokens (..., num_others + patches, hidden_size) with their patches on the grid of a student."""
    if tuple(grid) == tuple(wanted):
        return tokens
    return torch.cat([tokens[..., :num_others, :], _on_grid(tokens[..., num_others:, :], grid, wanted)], dim=-2)


def places_of(
    direction: DirectionOutput, num_others: int, *, class_token: str = "move"
) -> tuple[Tensor, Tensor | None]:
    """What teacher_in_order reads, as the numbers of the tokens (steps,), and of which steps; None = of all."""
    patches = direction.patches
    count = direction.grid[0] * direction.grid[1]
    if count == len(patches):
        return patches + num_others, None
    if class_token == "leave":
        steps = _steps_of_patches(patches, count)
        return patches[steps] + num_others, steps
    return torch.where(patches == TOKEN_WITHOUT_PATCH, 0, patches + num_others), None


def _steps_of_patches(patches: Tensor, count: int) -> Tensor:
    """The steps of patches, in order; a sort has a known size, so that nothing waits for the device."""
    return torch.argsort((patches == TOKEN_WITHOUT_PATCH).int(), stable=True)[:count]


def _on_grid(patches: Tensor, grid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    if len(wanted) != 2:
        raise InputError(
            f"the student scans a video of {' x '.join(map(str, wanted))} patches and the teacher an image; "
            "give a student of images."
        )
    if tuple(grid) == tuple(wanted):
        return patches
    image = patches.flatten(0, -3).transpose(1, 2).unflatten(2, tuple(grid)).float()
    resized = interpolate(image, size=tuple(wanted), mode="bilinear", align_corners=False, antialias=True)
    return resized.flatten(2).transpose(1, 2).unflatten(0, patches.shape[:-2]).to(patches.dtype)
