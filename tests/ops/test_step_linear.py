"""step_linear: norm, products, gate and sum, by every backend, against torch's own modules in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, rounding
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.ops import step_linear

BACKENDS = ["reference", "torch", pytest.param("triton", marks=needs_triton)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS: dict[str, dict[str, Any]] = {
    "one weight": {"outputs": [33]},
    "five weights": {"outputs": [40, 16, 7, 1, 17]},
    "norm": {"outputs": [20, 35], "norm": True},
    "sum": {"outputs": [50], "sum": True},
    "gate": {"outputs": [37, 37], "gated": True},
    "everything": {"outputs": [37, 37], "gated": True, "norm": True, "sum": True},
}


def draw(
    outputs: list[int],
    *,
    rows: int = 3,
    size: int = 70,
    norm: bool = False,
    sum: bool = False,
    gated: bool = False,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    return {
        "x": normal(rows, size),
        "weights": [normal(count, size) / size**0.5 for count in outputs],
        "norm_weight": normal(size) if norm else None,
        "residual": normal(rows, outputs[0]) if sum else None,
        "gated": gated,
        "eps": 1e-2,  # of a size that shows
    }


def exact(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    x = inputs["x"].double()
    if inputs["norm_weight"] is not None:
        x = rms_norm(x, x.shape[-1:], inputs["norm_weight"].double(), inputs["eps"])
    products = [linear(x, weight.double()) for weight in inputs["weights"]]
    if inputs["gated"]:
        products = [silu(products[0]) * products[1]]
    if inputs["residual"] is not None:
        products = [products[0] + inputs["residual"].double()]
    return tuple(products)


def worst(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    return max(relative_rms_error(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_in_fp64_it_is_the_formula(backend: str, form: str) -> None:
    inputs = draw(**FORMS[form])
    assert worst(step_linear(**inputs, backend=backend), exact(inputs)) < FP64_BOUND


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_inputs_round_where_modules_do(backend: str, form: str, dtype: torch.dtype, rows: int) -> None:
    """One row has a kernel of its own."""
    inputs = draw(**FORMS[form], dtype=dtype, rows=rows)
    found = step_linear(**inputs, backend=backend)
    assert all(y.dtype == dtype for y in found)
    # Sums of 70 in fp32; the norm's output, each product, the gate's and the last one are rounded. The interpreter cuts
    # bf16 off where it should round, which is twice the error.
    roundings = 8 if dtype == torch.bfloat16 else 4
    assert worst(found, exact(inputs)) < roundings * rounding(dtype) + 2**-24 * 70**0.5


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 64])
@pytest.mark.parametrize("size", [1, 16, 129, 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_sizes(backend: str, size: int, rows: int) -> None:
    inputs = draw([19, 19], rows=rows, size=size, norm=True, dtype=torch.float32)
    assert worst(step_linear(**inputs, backend=backend), exact(inputs)) < 2**-24 * (size**0.5 + 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_are_read_in_place(backend: str) -> None:
    inputs = draw([50], sum=True, dtype=torch.float32)
    wide = torch.randn(3, 200, device=DEVICE)
    given = inputs | {"x": wide[:, 10:80], "residual": wide[:, 100:150]}
    assert worst(step_linear(**given, backend=backend), exact(given)) < 1e-6


@pytest.mark.parametrize("fault", ["gate and up swapped", "norm dropped", "sum dropped"])
def test_the_bounds_would_show_a_fault(fault: str) -> None:
    inputs = draw(**FORMS["everything"])
    changes: dict[str, dict[str, Any]] = {
        "gate and up swapped": {"weights": inputs["weights"][::-1]},
        "norm dropped": {"norm_weight": None},
        "sum dropped": {"residual": None},
    }
    wrong = exact(inputs | changes[fault])
    assert worst(wrong, exact(inputs)) > FAULT_FACTOR * 4 * rounding(torch.bfloat16)


@needs_triton
def test_it_is_an_op_of_torch() -> None:
    from transmamba.ops.step_linear.triton import step_linear_op

    inputs = draw(**FORMS["everything"], dtype=torch.float32)
    given = (inputs["x"], inputs["weights"], inputs["norm_weight"], 1e-2, inputs["residual"], True)
    torch.library.opcheck(step_linear_op, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 69)}, r"give \(outputs, 69\)"),
        ({"weights": []}, "there are 0 weights"),
        ({"norm_weight": torch.zeros(3)}, r"norm_weight has shape \(3,\); give \(70,\)"),
        ({"residual": torch.zeros(3, 36)}, r"residual has shape \(3, 36\); give \(3, 37\)"),
        ({"gated": True, "weights": [torch.zeros(37, 70)]}, "gated takes two weights of one shape"),
    ],
)
def test_what_breaks_the_contract_is_named(change: dict[str, Any], message: str) -> None:
    inputs = {"x": torch.zeros(3, 70), "weights": [torch.zeros(37, 70)]} | change
    with pytest.raises(InputError, match=message):
        step_linear(**inputs)


@needs_triton
def test_more_rows_than_a_program_holds_are_refused() -> None:
    with pytest.raises(InputError, match="no kernel for 65 rows, at most 64"):
        step_linear(**draw([8], rows=65, dtype=torch.float32), backend="triton")


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 16, 64])
@pytest.mark.parametrize(("outputs", "size"), [([1536] * 4 + [16], 1536), ([4096] * 2, 1536), ([1536], 4096)], ids=str)
def test_large_products_on_a_card(outputs: list[int], size: int, rows: int, dtype: torch.dtype) -> None:
    last = len(outputs) == 1
    inputs = draw(outputs, size=size, rows=rows, norm=not last, sum=last, gated=len(outputs) == 2, dtype=dtype)
    found = [step_linear(**inputs, backend="triton") for _ in range(5)]
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))
    assert worst(found[0], exact(inputs)) < 4 * rounding(dtype) + 2**-22 * size**0.5
