"""softmax_attention against an explicit masked softmax: dense, with a past, packed and ragged."""

import sys
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import BORDERS, FAULT_FACTOR, FP64_BOUND, Inputs, gradients, in_double, rounding, worst_error
from tests.ops.oracle import ATTENTION_FAULTS, oracle_attention
from transmamba.ops import softmax_attention
from transmamba.ops.softmax_attention import softmax_attention_reference, softmax_attention_torch
from transmamba.ops.softmax_attention.torch import _documents_by_length, _rounded_up, without_cudnn

BACKENDS = ("reference", "torch")
HEADS = {
    "one head": (1, 1, 1),
    "equal": (4, 4, 4),
    "grouped-query": (8, 2, 2),
    "multi-query": (4, 1, 1),
    "few queries": (1, 1, 6),
    "not nested": (2, 3, 6),
    "keys and values differ": (4, 2, 4),
}


def attention_inputs(
    heads: tuple[int, int, int] = (8, 2, 2),
    *,
    batch: int = 2,
    queries: int = 9,
    keys: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = DEVICE,
) -> Inputs:
    keys = queries if keys is None else keys
    shapes = {"q": (batch, queries, heads[0], 6), "k": (batch, keys, heads[1], 6), "v": (batch, keys, heads[2], 5)}
    return {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("past", [0, 1, 5])
@pytest.mark.parametrize("queries", [1, 2, 3, 31])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_length_past_and_head_count_equals_the_matrix(
    heads: tuple[int, int, int], queries: int, past: int
) -> None:
    inputs = attention_inputs(heads, queries=queries, keys=queries + past)
    exact = oracle_attention(**inputs)
    for backend in BACKENDS:
        assert relative_rms_error(softmax_attention(**inputs, backend=backend), exact) < FP64_BOUND


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 0), (2, 0, 4)])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_gives_nothing(backend: str, heads: tuple[int, int, int], batch: int, queries: int, keys: int) -> None:
    y = softmax_attention(**attention_inputs(heads, batch=batch, queries=queries, keys=keys), backend=backend)
    assert y.shape == (batch, queries, max(heads), 5)


@pytest.mark.parametrize("borders", [*BORDERS.values(), [0, 4, 8, 12]], ids=[*BORDERS, "equal lengths"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_packed_documents_do_not_see_each_other(heads: tuple[int, int, int], borders: list[int]) -> None:
    inputs = attention_inputs(heads, batch=1, queries=borders[-1])
    exact = oracle_attention(**inputs, cu_seqlens=borders)
    for backend in BACKENDS:
        y = softmax_attention(**inputs, cu_seqlens=borders, backend=backend)
        assert relative_rms_error(y, exact) < FP64_BOUND


@pytest.mark.parametrize("rounded", [False, True], ids=["as they are", "rounded up"])
@pytest.mark.parametrize("borders", [BORDERS["uneven"], [0, 70, 75, 75, 140, 141]], ids=["uneven", "long"])
def test_documents_grouped_by_length_come_back_in_order(borders: list[int], rounded: bool) -> None:
    """Lengths are rounded up on GPUs only; what is rounded is checked here."""
    inputs = attention_inputs(batch=1, queries=borders[-1])
    groups, inverse = _documents_by_length(tuple(borders), DEVICE, rounded=rounded)
    parts = [oracle_attention(*(x[0][group] for x in inputs.values())).flatten(0, 1) for group in groups]
    exact = oracle_attention(**inputs, cu_seqlens=borders)
    assert relative_rms_error(torch.cat(parts)[inverse][None], exact) < FP64_BOUND
    assert sum(group.numel() for group in groups) == borders[-1] or rounded


def test_rounding_up_leaves_few_lengths_and_little_padding() -> None:
    lengths = {length: _rounded_up(length) for length in range(1, 5000)}
    assert all(length <= up <= max(16, 1.25 * length + 16) for length, up in lengths.items())
    assert all(up <= 1.25 * length for length, up in lengths.items() if length >= 64)
    assert len(set(lengths.values())) < 40


RAGGED = {
    "both": ([3, 0, 1, 5], [7, 4, 1, 5]),
    "keys only": (None, [9, 5, 6, 7]),
    "queries only": ([3, 0, 1, 5], None),
}


def oracle_ragged(q: Tensor, k: Tensor, v: Tensor, query_lengths: list[int], key_lengths: list[int]) -> Tensor:
    rows = []
    for row, (queries, keys) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        one = slice(row, row + 1)
        y = oracle_attention(q[one, :queries], k[one, :keys], v[one, :keys])
        rows.append(torch.nn.functional.pad(y, (0, 0, 0, 0, 0, q.shape[1] - queries)))
    return torch.cat(rows)


@pytest.mark.parametrize(("query_lengths", "key_lengths"), RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_rows_equal_separate_ones(
    backend: str, query_lengths: list[int] | None, key_lengths: list[int] | None
) -> None:
    inputs = attention_inputs(batch=4, queries=5, keys=9)
    options = {"query_lengths": query_lengths, "key_lengths": key_lengths}
    full = {"query_lengths": query_lengths or [5] * 4, "key_lengths": key_lengths or [9] * 4}
    y = softmax_attention(**inputs, **options, backend=backend)
    assert relative_rms_error(y, oracle_ragged(**inputs, **full)) < FP64_BOUND
    exact = gradients(oracle_ragged, inputs, **full)
    assert worst_error(gradients(softmax_attention, inputs, **options, backend=backend), exact) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_queries_give_zero_and_no_gradient(backend: str) -> None:
    inputs = attention_inputs(batch=4, queries=5, keys=9)
    lengths = {"query_lengths": [0, 0, 0, 0], "key_lengths": [0, 3, 0, 1]}
    assert not softmax_attention(**inputs, **lengths, backend=backend).any()
    for x in gradients(lambda **given: softmax_attention(**given, **lengths).sum() + 0 * given["q"].sum(), inputs):
        assert not x.any()


@pytest.mark.parametrize("token", [0, 4, 8])
def test_no_output_sees_the_future(token: int) -> None:
    inputs = attention_inputs()
    changed = {name: x.clone() for name, x in inputs.items()}
    for x in changed.values():
        x[:, token] += 1
    y, y_changed = softmax_attention(**inputs), softmax_attention(**changed)
    assert torch.equal(y[:, :token], y_changed[:, :token])
    assert not torch.equal(y[:, token], y_changed[:, token])


@pytest.mark.parametrize("options", [{}, {"cu_seqlens": [0, 1, 1, 4]}, {"query_lengths": [2], "key_lengths": [3]}])
@pytest.mark.parametrize("implementation", [softmax_attention_reference, softmax_attention_torch], ids=BACKENDS)
def test_gradients_are_those_of_finite_differences(implementation: Any, options: dict[str, list[int]]) -> None:
    inputs = attention_inputs((2, 1, 2), batch=1, queries=4, device="cpu")

    def output(*values: Tensor) -> Tensor:
        return implementation(*values, **options)

    assert torch.autograd.gradcheck(output, tuple(x.requires_grad_() for x in inputs.values()))


@pytest.mark.parametrize("borders", [None, BORDERS["uneven"]], ids=["dense", "packed"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_gradients_equal_those_of_the_matrix(heads: tuple[int, int, int], borders: list[int] | None) -> None:
    inputs = attention_inputs(heads, **({} if borders is None else {"batch": 1, "queries": borders[-1]}))
    exact = gradients(oracle_attention, inputs, cu_seqlens=borders)
    assert worst_error(gradients(softmax_attention, inputs, cu_seqlens=borders), exact) < FP64_BOUND


def bound_of(dtype: torch.dtype) -> float:
    """The output is rounded, and kernels may round the weights; scores in fp32 sum 6 products."""
    return 2 * rounding(dtype) + 2**-24 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_inputs_err_by_rounding_only(backend: str, dtype: torch.dtype) -> None:
    inputs = attention_inputs(queries=67, dtype=dtype)
    y = softmax_attention(**inputs, backend=backend)
    assert y.dtype == dtype
    assert relative_rms_error(y, oracle_attention(**in_double(inputs))) < bound_of(dtype)


@pytest.mark.parametrize("fault", [*ATTENTION_FAULTS, "heads in turn"])
def test_the_bounds_would_show_wrong_attention(fault: str) -> None:
    for heads, queries in product([(8, 2, 2), (4, 2, 4)], [9, 67]):
        inputs = attention_inputs(heads, queries=queries)
        exact, wrong = oracle_attention(**inputs), oracle_attention(**inputs, fault=fault)
        assert relative_rms_error(wrong, exact) > FAULT_FACTOR * bound_of(torch.bfloat16)


def test_documents_of_rounded_lengths_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    borders = [0, 1, 1, 18, 50, 137, 138, 400]
    q, k, v = (torch.randn(1, 400, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = softmax_attention(q, k, v, cu_seqlens=borders)
    implementation = sys.modules["transmamba.ops.softmax_attention.torch"]
    exact = implementation._documents_by_length
    monkeypatch.setattr(
        implementation, "_documents_by_length", lambda b, device, rounded: exact(b, device, rounded=True)
    )
    assert relative_rms_error(softmax_attention(q, k, v, cu_seqlens=borders), expected) < 1e-12


def test_rounding_adds_at_most_a_quarter_to_long_documents() -> None:
    rounded_up = sys.modules["transmamba.ops.softmax_attention.torch"]._rounded_up
    assert all(n <= rounded_up(n) <= max(n + 15, n * 1.25) for n in range(1, 5000))
    assert len({rounded_up(n) for n in range(1, 2049)}) < 25


@pytest.mark.parametrize("past", [0, 5])
def test_heads_that_no_kernel_shares_are_repeated(past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def no_kernel(q: Tensor, k: Tensor, *_: object) -> bool:
        asked.append(k.shape[1])
        return False

    monkeypatch.setattr(sys.modules[softmax_attention_torch.__module__], "_reads_groups", no_kernel)
    inputs = attention_inputs((8, 2, 2), keys=9 + past)
    y = softmax_attention(**inputs, backend="torch")
    assert asked == [2]
    assert relative_rms_error(y, oracle_attention(**inputs)) < FP64_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_heads_make_no_matrix_on_a_card(dtype: torch.dtype, cudnn: bool) -> None:
    length, heads = 2048, (8, 4, 4)
    shapes = [(4, length, count, 64) for count in heads]
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with nullcontext() if cudnn else without_cudnn(q.device):
        softmax_attention(q, k, v).sum().backward()
    matrix = 4 * heads[0] * length**2 * 4  # bytes of the weights in fp32
    assert torch.cuda.max_memory_allocated() - before < matrix / 2
