"""Products of tensors whose head counts differ equal those of repeated heads."""

import pytest
import torch
from torch import Tensor

from transmamba.ops.heads import accumulation_dtype, expand_heads, head_matmul, head_multiply

PAIRS = [(1, 1), (4, 4), (6, 2), (2, 6), (1, 6), (6, 1), (2, 3), (4, 6)]


def repeated(x: Tensor, heads: int) -> Tensor:
    return x[:, [h * x.shape[1] // heads for h in range(heads)]]


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=str)
def test_products_equal_those_of_repeated_heads(a: int, b: int) -> None:
    left, right = torch.randn(2, a, 3, 4).double(), torch.randn(2, b, 4, 5).double()
    heads = torch.tensor([a, b]).max().item() if max(a, b) % min(a, b) == 0 else torch.lcm(*torch.tensor([a, b])).item()
    product = head_matmul(left, right)
    assert product.shape == (2, heads, 3, 5)
    torch.testing.assert_close(product, repeated(left, heads) @ repeated(right, heads), rtol=1e-12, atol=1e-12)
    scaled = head_multiply(left, right[..., :1, :4])
    assert torch.equal(scaled, repeated(left, heads) * repeated(right[..., :1, :4], heads))


@pytest.mark.parametrize(("a", "b"), [(6, 2), (2, 6)], ids=str)
def test_an_empty_batch_stays_empty(a: int, b: int) -> None:
    assert head_matmul(torch.randn(0, a, 3, 4), torch.randn(0, b, 4, 5)).shape == (0, 6, 3, 5)
    assert head_multiply(torch.randn(0, a, 3), torch.randn(0, b, 3)).shape == (0, 6, 3)


def test_equal_counts_are_not_copied() -> None:
    x = torch.randn(2, 4, 3)
    assert expand_heads(x, 4, dim=1) is x


def test_states_are_never_sixteen_bits_wide() -> None:
    widths = {dtype: accumulation_dtype(torch.zeros(1, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)}
    assert set(widths.values()) == {torch.float32}
    assert accumulation_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
