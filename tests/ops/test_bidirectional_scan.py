"""bidirectional_scan: every backend against the formula in fp64, with padding, over chunks, and its gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE, fill_scratch_with_nan, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, rounding
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.ops import bidirectional_scan
from transmamba.ops.backends import prefer
from transmamba.ops.bidirectional_scan import runs_as_kernels

HEADS = 2
FORMS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no convolution": {"kernel": 0},
    "no convolution, SiLU": {"kernel": 0, "silu": True},
    "no bias, SiLU": {"bias": False, "silu": True},
    "one tap": {"kernel": 1},
    "no mean term": {"mean": False},
    "no gate": {"gate": False},
}
TENSORS = ("q", "k", "v", "dt", "m", "gate", "weight", "bias")


def draw(
    seq_len: int = 9,
    head_dim: int = 16,
    *,
    batch: int = 2,
    kernel: int = 3,
    silu: bool = False,
    bias: bool = True,
    mean: bool = True,
    gate: bool = True,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    width = HEADS * head_dim
    # Columns of one tensor, as a joint projection gives them; what lies between them must not be read.
    wide = normal(batch, seq_len, 4 * width + 3 * HEADS)
    q, k, v, z, dt, m = wide.split([width, width, width, width, 2 * HEADS, HEADS], dim=-1)

    def pair(shift: float) -> tuple[Tensor, Tensor]:
        return normal(HEADS) + shift, normal(HEADS) + shift

    return {
        "q": q,
        "k": k,
        "v": v,
        "dt": dt,
        "dt_bias": pair(-1.0),
        "A_log": pair(-2.0),
        "D": pair(0.0),
        "m": m if mean else None,
        "gate": z if gate else None,
        "weight": normal(3 * width, kernel) if kernel else None,
        "bias": normal(3 * width) if kernel and bias else None,
        "activation": "silu" if silu else None,
        "lengths": None if lengths is None else torch.tensor(lengths, device=DEVICE),
    }


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    def one(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(one, x))
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: one(x) for name, x in inputs.items()}


def matrix_form(x: dict[str, Any], *, forget: float = 1.0) -> Tensor:
    """The tokens x tokens weights of both directions in the text's own order, one row and head at a time."""
    batch, seq_len, width = x["q"].shape
    size = width // HEADS
    y = torch.zeros(batch, seq_len, width, dtype=torch.float64, device=x["q"].device)
    for row in range(batch):
        length = seq_len if x["lengths"] is None else int(x["lengths"][row])
        places = torch.arange(length, device=y.device)
        apart = places[:, None] - places
        for way, sign in enumerate((1, -1)):
            parts = []
            for number, name in enumerate("qkv"):
                part = x[name][row, :length]
                if x["weight"] is not None:
                    taps = x["weight"][number * width : (number + 1) * width]
                    kernel = taps.shape[1]
                    part = sum(
                        ((sign * apart == tap).double() @ part) * taps[:, kernel - 1 - tap] for tap in range(kernel)
                    )
                    if x["bias"] is not None:
                        part = part + x["bias"][number * width : (number + 1) * width]
                parts.append(torch.nn.functional.silu(part) if x["activation"] else part)
            for head in range(HEADS):
                q, k, v = (part[:, head * size : (head + 1) * size] for part in parts)
                raw = x["dt"][row, :length, way * HEADS + head] + x["dt_bias"][way][head]
                step = torch.nn.functional.softplus(raw)
                decay = -forget * x["A_log"][way][head].exp() * step
                total = decay.cumsum(0) if sign > 0 else decay.flip(0).cumsum(0).flip(0)
                weights = q @ k.T / size**0.5 + (0 if x["m"] is None else x["m"][row, :length, head])
                weights = weights * (total[:, None] - total).exp() * step * (sign * apart >= 0)
                found = weights.nan_to_num() @ v + x["D"][way][head] * v
                y[row, :length, head * size : (head + 1) * size] += found
    return y if x["gate"] is None else y * torch.nn.functional.silu(x["gate"])


@pytest.mark.parametrize("lengths", [None, [9, 4], [0, 1]], ids=["whole", "padded", "nothing"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_in_fp64_it_is_the_formula(backend: str, form: str, lengths: list[int] | None) -> None:
    inputs = draw(**FORMS[form], lengths=lengths)
    y = bidirectional_scan(**inputs, backend=backend)
    exact = matrix_form(inputs)
    assert relative_rms_error(y, exact) < FP64_BOUND
    assert lengths is None or all(not y[row, length:].any() for row, length in enumerate(lengths))
    assert relative_rms_error(matrix_form(inputs, forget=1.01), exact) > FAULT_FACTOR * FP64_BOUND or lengths == [0, 1]


# Roundings of a term, of which errors are independent: inputs are given; q, k, v after the convolution, scores, what is
# written, the state, each twice in a product at most, and y.
ROUNDINGS = 12
SINGLE = 2e-6 * 12**0.5  # fp32: sums over up to 200 tokens and exponents of up to some tens


def bound(dtype: torch.dtype) -> float:
    return SINGLE if dtype == torch.float32 else rounding(dtype) * ROUNDINGS**0.5


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_kernels_round_little(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(150, **FORMS[form], lengths=[150, 67], dtype=dtype)
    exact = bidirectional_scan(**widened(inputs), backend="torch")
    fill_scratch_with_nan(monkeypatch)
    y = bidirectional_scan(**inputs, backend="triton")
    assert y.dtype == dtype
    assert relative_rms_error(y, exact) < bound(dtype)
    assert not y[1, 67:].any()
    faulty = widened(inputs) | {"A_log": tuple(x + 0.7 for x in widened(inputs)["A_log"])}
    assert relative_rms_error(bidirectional_scan(**faulty, backend="torch"), exact) > FAULT_FACTOR * bound(dtype)


@needs_triton
@pytest.mark.parametrize("head_dim", [16, 32, 64])
@pytest.mark.parametrize("seq_len", [1, 63, 64, 65, 129])
def test_kernels_at_the_borders_of_chunks(seq_len: int, head_dim: int) -> None:
    inputs = draw(seq_len, head_dim, batch=1, kernel=4, dtype=torch.float32)
    exact = bidirectional_scan(**widened(inputs), backend="torch")
    assert relative_rms_error(bidirectional_scan(**inputs, backend="triton"), exact) < bound(torch.float32)


@needs_triton
def test_more_chunks_than_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    from transmamba.ops.bidirectional_scan import triton as room

    monkeypatch.setattr(room, "AHEAD", 2)
    inputs = draw(64 * 5 + 3, batch=1, dtype=torch.float32)
    exact = bidirectional_scan(**widened(inputs), backend="torch")
    assert relative_rms_error(bidirectional_scan(**inputs, backend="triton"), exact) < bound(torch.float32)


@needs_triton
def test_states_that_are_forgotten_within_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of some tens: whole chunks leave nothing, and no sum of them may overflow."""
    inputs = draw(150, dtype=torch.float32)
    inputs["dt_bias"] = tuple(x + 30 for x in inputs["dt_bias"])
    exact = bidirectional_scan(**widened(inputs), backend="torch")
    found = bidirectional_scan(**inputs, backend="triton")
    # Sums of a reach 64 * 30, whose spacing in fp32 is 2^-13 of the exponent.
    assert relative_rms_error(found, exact) < 2**-11


def test_gradients_are_those_of_the_formula() -> None:
    inputs = draw(5, 2, lengths=[5, 3], silu=True)
    names = [name for name in TENSORS if inputs[name] is not None]
    pairs = ("dt_bias", "A_log", "D")

    def run(*values: Tensor) -> Tensor:
        alone = dict(zip(names, values[: len(names)], strict=True))
        twos = values[len(names) :]
        both = {name: (twos[2 * i], twos[2 * i + 1]) for i, name in enumerate(pairs)}
        return bidirectional_scan(**(inputs | alone | both))

    values = [inputs[name] for name in names] + [x for name in pairs for x in inputs[name]]
    leaves = [x.detach().clone().requires_grad_() for x in values]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@needs_triton
def test_kernels_have_no_gradients_and_say_so() -> None:
    inputs = draw(dtype=torch.float32)
    inputs["weight"].requires_grad_()
    with pytest.raises(InputError, match="it has no gradients; pass backend='torch'"):
        bidirectional_scan(**inputs, backend="triton")
    with torch.no_grad():
        bidirectional_scan(**inputs, backend="triton")
    with prefer("triton", "bidirectional_scan"):
        assert bidirectional_scan(**inputs).requires_grad  # plain PyTorch


@needs_triton
def test_torch_sees_one_op() -> None:
    from transmamba.ops.bidirectional_scan.triton import bidirectional_scan_op

    x = draw(dtype=torch.float32, lengths=[9, 2])
    given = (x["q"], x["k"], x["v"], x["dt"], *x["dt_bias"], *x["A_log"], *x["D"])
    inputs = (*given, x["m"], x["gate"], x["weight"], x["bias"], x["lengths"], True)
    torch.library.opcheck(bidirectional_scan_op, inputs, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_sizes_without_kernels_run_as_plain_torch() -> None:
    x = torch.zeros(1)
    with prefer("triton", "bidirectional_scan"):
        assert runs_as_kernels(x.to(DEVICE), 32, 4) == (DEVICE.type == "cuda")
        assert not runs_as_kernels(x, 24, 4)
        assert not runs_as_kernels(x, 32, 9)
        inputs = draw(head_dim=24, dtype=torch.float32)
        exact = bidirectional_scan(**widened(inputs), backend="torch")
        assert relative_rms_error(bidirectional_scan(**inputs), exact) < bound(torch.float32)
    with pytest.raises(InputError, match="for head_dim 16, 32, 64, and here it is 24"):
        bidirectional_scan(**inputs, backend="triton")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(2, 9, 5)}, r"k has shape \(2, 9, 5\); give \(2, 9, 32\)"),
        ({"dt": torch.zeros(2, 9, 2)}, r"dt has shape \(2, 9, 2\); give \(2, 9, 4\)"),
        ({"D": (torch.zeros(5), torch.zeros(5))}, r"q has shape \(2, 9, 32\) and D \(5,\)"),
        ({"A_log": (torch.zeros(2), torch.zeros(3))}, r"A_log, backward has shape \(3,\); give \(2,\)"),
        ({"activation": "gelu"}, "activation is 'gelu'; choose 'silu' or None"),
        ({"lengths": torch.zeros(2)}, "lengths are torch.float32"),
        ({"lengths": torch.zeros(3, dtype=torch.long)}, r"give whole numbers, \(2,\)"),
        ({"weight": None}, "a bias without a weight"),
        ({"v": torch.full((2, 9, 32), float("nan"), dtype=torch.float64)}, "v"),
    ],
)
def test_bad_inputs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bidirectional_scan(**(draw() | changes), backend="torch")
