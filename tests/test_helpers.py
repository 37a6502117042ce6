"""The helpers themselves: error measures that hide nothing, and scratch memory that is really NaN."""

import math

import pytest
import torch
from torch import nn

from tests.helpers import fill_scratch_with_nan, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, gradients, ssd_inputs
from tests.ops.kernels import rate_error
from tests.ops.oracle import oracle_scan


def test_error_is_relative_to_the_exact_value() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_rms_error(exact, exact) == 0.0
    assert relative_rms_error(1.25 * exact, exact) == pytest.approx(0.25)


def test_error_against_zero_is_absolute() -> None:
    assert relative_rms_error(torch.full((3,), 0.5), torch.zeros(3)) == pytest.approx(0.5)


def test_error_shows_nan_and_refuses_to_broadcast() -> None:
    assert math.isnan(relative_rms_error(torch.tensor([1.0, math.nan]), torch.ones(2)))
    with pytest.raises(AssertionError, match="compared with"):
        relative_rms_error(torch.ones(1), torch.ones(2))


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3),
        lambda: torch.empty((2, 3), dtype=torch.bfloat16),
        lambda: torch.empty(3, requires_grad=True),
        lambda: torch.empty_like(torch.ones(3, dtype=torch.float64)),
        lambda: torch.empty_strided((2, 3), (3, 1)),
        lambda: torch.ones(1).new_empty(3),
        lambda: torch.ones(1).new_empty_strided((2, 3), (3, 1)),
    ],
    ids=["empty", "bfloat16", "requires_grad", "empty_like", "empty_strided", "new_empty", "new_empty_strided"],
)
def test_scratch_memory_is_nan(monkeypatch: pytest.MonkeyPatch, allocate) -> None:
    fill_scratch_with_nan(monkeypatch)
    assert allocate().isnan().all()


def test_scratch_memory_of_integers_and_meta_tensors_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_scratch_with_nan(monkeypatch)
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
    assert torch.empty(3, device="meta").is_meta


def test_modules_initialise_and_train_over_nan_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_scratch_with_nan(monkeypatch)
    layer = nn.Linear(4, 4)
    layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.isfinite().all()
    assert layer.weight.grad.isfinite().all()


def test_gradcheck_works_over_nan_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_scratch_with_nan(monkeypatch)
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(torch.sin, (x,))


@pytest.mark.parametrize("borders", [None, [0, 0, 3, 4, 20]], ids=["dense", "packed"])
def test_what_tokens_contribute_to_rates_adds_up_to_their_gradient(borders: list[int] | None) -> None:
    shape = {"batch": 1, "rows": 4} if borders else {"batch": 2}
    inputs = ssd_inputs((4, 2, 2, 4), seq_len=20, **shape)
    gradient = gradients(oracle_scan, inputs, cu_seqlens=borders)[list(inputs).index("A")]
    assert rate_error(gradient, inputs, cu_seqlens=borders) < FP64_BOUND
    assert rate_error(1.1 * gradient, inputs, cu_seqlens=borders) > FAULT_FACTOR * FP64_BOUND
