"""The teacher's tokens in the order of a student's scan, and how near the student's features are to them.

Letters: m a direction, i a layer of the student, t a step of the scan, pi_m(t) the raster index of the patch visited
there. With Y the student's features of direction m in scan order, before the directions are merged,

    c_im = mean over t of cos( P(Y_im[t]), T_g(i)[pi_m(t)] )

Means over patches do not change when the order does, so the comparison is token by token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import interpolate, layer_norm, normalize

from transmamba.errors import InputError
from transmamba.modules import DirectionOutput
from transmamba.modules.scan_orders import TOKEN_WITHOUT_PATCH

CLASS_TOKENS = ("move", "leave")
LEAST_LENGTH = 1e-8  # of features, so that those without any have a cosine of 0


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
        # The steps of patches, in order; a sort has a known size, so that nothing waits for the device.
        steps = torch.argsort((direction.patches == TOKEN_WITHOUT_PATCH).int(), stable=True)[:count]
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
    return cosine_to_standardised(student, standardised(teacher.to(dtype)), inside)


def standardised(features: Tensor) -> Tensor:
    """Features (..., width), fp32 or fp64, without mean and of length 1."""
    return normalize(layer_norm(features, features.shape[-1:]), dim=-1, eps=LEAST_LENGTH)


def cosine_to_standardised(student: Tensor, teacher: Tensor, inside: Tensor | None = None) -> Tensor:
    """direction_cosine with teacher's features that are standardised already, which several directions share."""
    cosines = _Cosine.apply(student, teacher)
    if inside is None:
        return cosines.mean(dim=(-2, -1))
    return torch.where(inside, cosines, 0.0).sum(dim=(-2, -1)) / inside.sum().clamp(min=1)


class _Cosine(torch.autograd.Function):
    """The cosines (...) of x, standardised, and of y, which is so already, each (..., width).

    With a the layer norm of x, c = a y / |a|, whose gradient y / |a| - c a / |a|^2 has no mean and is orthogonal to a:
    so layer norm's own gradient does nothing but scale it. Step by step, autograd would keep and walk through five
    tensors of the features' size in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        a, _, scale = torch.native_layer_norm(x.to(y.dtype), x.shape[-1:], None, None, 1e-5)
        length = torch.linalg.vector_norm(a, dim=-1, keepdim=True).clamp(min=LEAST_LENGTH)
        cosine = (a * y).sum(-1, keepdim=True) / length
        ctx.save_for_backward(a, y, cosine, scale, length)
        ctx.dtype = x.dtype
        return cosine.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        a, y, cosine, scale, length = ctx.saved_tensors
        slope = gradients[0].unsqueeze(-1) / length
        dx = (y * (slope * scale)).addcmul_(a, -slope * scale * cosine / length).to(ctx.dtype)
        return dx, slope * a if ctx.needs_input_grad[1] else None


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


def standardised_on_grid(tokens: Tensor, num_others: int, grid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """A teacher's tokens standardised, in fp32 or fp64, their patches on the grid of a student; see teacher_in_order.

    Once for all directions: a token's own mean and length do not change when the order does.
    """
    if tuple(grid) != tuple(wanted):
        patches = _on_grid(tokens[..., num_others:, :], grid, wanted)
        tokens = torch.cat([tokens[..., :num_others, :], patches], dim=-2)
    return standardised(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))


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
