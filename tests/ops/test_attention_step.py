"""attention_step: one query per row against stored keys, by every backend, against softmax_attention in fp64."""

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, rounding
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.ops import attention_step, softmax_attention
from transmamba.ops.attention_step import attention_step_torch

BACKENDS = ["reference", "torch", pytest.param("triton", marks=needs_triton)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(
    heads: tuple[int, int] = (4, 2),
    *,
    places: int = 300,
    lengths: tuple[int, ...] = (1, 300, 64, 129),
    sizes: tuple[int, int] = (20, 12),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, keys, values and lengths."""
    generator, rows = torch.Generator().manual_seed(0), len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    q, keys, values = normal(rows, heads[0], sizes[0]), *(normal(rows, places, heads[1], size) for size in sizes)
    return 2 * q, keys, values, torch.tensor(lengths, device=DEVICE)


def exact(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    out = [
        softmax_attention(
            q[row, None, None].double(), keys[row, None, :length].double(), values[row, None, :length].double()
        )[0, 0]
        for row, length in enumerate(lengths.tolist())
    ]
    return torch.stack(out)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_in_fp64_it_is_the_last_row_of_attention(backend: str) -> None:
    inputs = draw()
    assert relative_rms_error(attention_step(*inputs, backend=backend), exact(*inputs)) < FP64_BOUND


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 1), (34, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (20, 12), (16, 48), (96, 96)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_and_sizes(backend: str, sizes: tuple[int, int], heads: tuple[int, int]) -> None:
    inputs = draw(heads, sizes=sizes, places=150, lengths=(150, 3), dtype=torch.float32)
    # A score reaches about 12 and its absolute error is a weight's relative one; sums run over 150 tokens.
    bound = 2**-24 * (2 * 12 * sizes[0] ** 0.5 + 150**0.5)
    assert relative_rms_error(attention_step(*inputs, backend=backend), exact(*inputs)) < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_inputs_round_weights_and_outputs(backend: str, dtype: torch.dtype) -> None:
    inputs = draw(dtype=dtype)
    y = attention_step(*inputs, backend=backend)
    assert y.dtype == dtype
    # Weights and the output are rounded once each; the interpreter cuts bf16 off where it should round.
    assert relative_rms_error(y, exact(*inputs)) < 3 * rounding(dtype) + 2**-16


@pytest.mark.parametrize("lengths", [(1,), (2, 1), (64, 65), (127, 128, 129), (640, 1, 333)], ids=str)
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_nothing_behind_a_row_is_read(backend: str, lengths: tuple[int, ...]) -> None:
    q, keys, values, n = draw(places=640, lengths=lengths, dtype=torch.float32)
    wanted = exact(q, keys, values, n)
    for row, length in enumerate(lengths):
        keys[row, length:], values[row, length:] = float("nan"), float("nan")
    assert relative_rms_error(attention_step(q, keys, values, n, backend=backend), wanted) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_storage_may_be_a_slice(backend: str) -> None:
    q, keys, values, n = draw(dtype=torch.float32, lengths=(90, 12))
    found = attention_step(q, keys[:, :100], values[:, :100], n, backend=backend)
    assert relative_rms_error(found, exact(q, keys, values, n)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_give_nothing(backend: str) -> None:
    q, keys, values, n = draw(dtype=torch.float32)
    assert attention_step(q[:0], keys[:0], values[:0], n[:0], backend=backend).shape == (0, 4, 12)


def test_the_bounds_would_show_a_length_that_is_off_by_one() -> None:
    q, keys, values, n = draw(lengths=(300, 64, 129))
    wrong = attention_step_torch(q, keys, values, n - 1)
    assert relative_rms_error(wrong, exact(q, keys, values, n)) > FAULT_FACTOR * 3 * rounding(torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str) -> None:
    *inputs, lengths = draw(dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    weight = torch.randn_like(attention_step(*leaves, lengths))
    found = torch.autograd.grad((attention_step(*leaves, lengths, backend=backend) * weight).sum(), leaves)
    wanted = torch.autograd.grad((exact(*leaves, lengths) * weight).sum(), leaves)
    assert max(relative_rms_error(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-5


@needs_triton
def test_it_is_an_op_of_torch() -> None:
    from transmamba.ops.attention_step.triton import attention_step_op

    inputs = draw(dtype=torch.float32)
    torch.library.opcheck(attention_step_op, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 3, 20)}, "2 heads of keys do not divide the 3 heads of q"),
        ({"keys": (2, 9, 2, 19)}, "must agree"),
        ({"values": (2, 8, 2, 12)}, "must agree"),
        ({"lengths": (3,)}, r"give \(2,\) whole numbers"),
        ({"q": (2, 1, 4, 20)}, "have 4, 4 and 4 dimensions"),
    ],
)
def test_what_breaks_the_contract_is_named(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"q": (2, 4, 20), "keys": (2, 9, 2, 20), "values": (2, 9, 2, 12)} | change
    lengths = torch.ones(shapes.pop("lengths", (2,)), dtype=torch.int64)
    with pytest.raises(InputError, match=message):
        attention_step(**{name: torch.zeros(shape) for name, shape in shapes.items()}, lengths=lengths)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 67])
def test_long_rows_on_a_card(rows: int, dtype: torch.dtype) -> None:
    lengths = tuple(1 + (row * 7919 + 8191) % 8192 for row in range(rows))
    inputs = draw((16, 16), places=8192, lengths=lengths, sizes=(96, 96), dtype=dtype)
    found = [attention_step(*inputs, backend="triton") for _ in range(5)]
    assert all(torch.equal(found[0], other) for other in found)
    assert relative_rms_error(found[0], exact(*inputs)) < 3 * rounding(dtype) + 1e-5
