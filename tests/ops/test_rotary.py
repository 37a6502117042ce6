"""Rotary embedding turns pairs of a vector by an angle; undoing turns them back."""

import pytest
import torch
from torch import Tensor

from tests.helpers import relative_rms_error
from tests.ops.cases import FP64_BOUND
from tests.ops.oracle import rotate
from transmamba.ops import apply_rotary
from transmamba.ops.rotary import undo_rotary


def tables(*shape: int, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    angle = torch.randn(*shape).double()
    angle = torch.cat([angle, angle], dim=-1)
    return scaling * angle.cos(), scaling * angle.sin()


@pytest.mark.parametrize("lead", [(7,), (2, 7)], ids=["shared", "per row"])
def test_it_is_a_product_of_complex_numbers(lead: tuple[int, ...]) -> None:
    x, (cos, sin) = torch.randn(2, 7, 3, 6).double(), tables(*lead, 3)
    assert relative_rms_error(apply_rotary(x, cos, sin), rotate(x, (cos, sin))) < FP64_BOUND
    assert relative_rms_error(apply_rotary(x, cos, -sin), rotate(x, (cos, sin))) > 0.1


@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_undoing_restores_the_input(scaling: float) -> None:
    x, (cos, sin) = torch.randn(2, 7, 3, 6).double(), tables(2, 7, 3, scaling=scaling)
    assert relative_rms_error(undo_rotary(apply_rotary(x, cos, sin), cos, sin), x) < FP64_BOUND


def test_undoing_computes_in_fp32() -> None:
    x, (cos, sin) = torch.randn(2, 7, 3, 6).bfloat16(), tables(2, 7, 3)
    undone = undo_rotary(x, cos, sin)
    assert undone.dtype == torch.float32
    assert relative_rms_error(undone, rotate(x, (cos, -sin))) < 2**-22  # four roundings of fp32
    assert relative_rms_error(undone.bfloat16(), rotate(x, (cos, -sin))) > 2**-22


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(6).double(), torch.randn(6).double()
    angle = torch.arange(9.0).double()[:, None] * torch.tensor([1.0, 0.3, 0.05]).double()
    angle = torch.cat([angle, angle], dim=-1)
    q_r, k_r = (apply_rotary(x.expand(1, 9, 1, 6), angle.cos(), angle.sin())[0, :, 0] for x in (q, k))
    scores = q_r @ k_r.T
    assert relative_rms_error(scores[3:, 3:], scores[:-3, :-3]) < FP64_BOUND


@pytest.mark.parametrize("lead", [(7,), (2, 7)], ids=["shared", "per row"])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_gradients_are_those_of_finite_differences(lead: tuple[int, ...], scaling: float) -> None:
    x, (cos, sin) = torch.randn(2, 7, 3, 6).double().requires_grad_(), tables(*lead, 3, scaling=scaling)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary(x, cos, sin).square(), x)
    leaves = (x, cos.requires_grad_(), sin.requires_grad_())
    assert torch.autograd.gradcheck(apply_rotary, leaves)


def test_it_is_the_same_inside_a_transform_and_a_compiler() -> None:
    x, (cos, sin) = torch.randn(2, 7, 3, 6).double(), tables(7, 3)
    y, turned = torch.func.vjp(lambda x: apply_rotary(x, cos, sin), x)
    assert relative_rms_error(y, apply_rotary(x, cos, sin)) < FP64_BOUND
    assert relative_rms_error(turned(x)[0], apply_rotary(x, cos, -sin)) < FP64_BOUND
    compiled = torch.compile(apply_rotary, backend="aot_eager", fullgraph=True)
    assert relative_rms_error(compiled(x, cos, sin), y) < FP64_BOUND
    torch.compiler.reset()


def test_sixteen_bits_round_twice() -> None:
    x, (cos, sin) = torch.randn(2, 57, 3, 6).bfloat16(), (t.bfloat16() for t in tables(57, 3))
    exact = rotate(x.double(), (cos.double(), sin.double()))
    assert relative_rms_error(apply_rotary(x, cos, sin), exact) < 2 * 2**-9
