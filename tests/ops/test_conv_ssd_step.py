"""conv_ssd_step: one token at a time, by every backend, against the ops it is made of over the whole row in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, rounding
from tests.ops.kernels import needs_triton
from transmamba.errors import InputError
from transmamba.ops import causal_conv1d, conv_ssd_step, ssd_scan

BACKENDS = ["reference", "torch", pytest.param("triton", marks=needs_triton)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(1, 1, 1), (4, 4, 4), (4, 2, 2), (4, 4, 1), (6, 2, 1)]  # of queries, states, keys
TOKENS = 6


def draw(
    heads: tuple[int, int, int] = (4, 2, 1),
    *,
    rows: int = 2,
    sizes: tuple[int, int] = (6, 5),
    kernel: int = 4,
    gate: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Projections of TOKENS tokens, (rows, TOKENS, ...), and the weights that do not depend on the token."""
    generator = torch.Generator().manual_seed(0)
    (q_heads, state_heads, key_heads), (n, p) = heads, sizes
    channels = q_heads * n + key_heads * (n + p)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    tokens = {
        "q": normal(rows, TOKENS, q_heads * n),
        "k": normal(rows, TOKENS, key_heads * n),
        "v": normal(rows, TOKENS, key_heads * p),
        "dt": normal(rows, TOKENS, state_heads),
        "z": normal(rows, TOKENS, q_heads * p) if gate else None,
    }
    return tokens | {
        "weight": normal(channels, kernel) if kernel else None,
        "bias": normal(channels) if kernel and bias else None,
        "dt_bias": normal(state_heads),
        "A_log": normal(state_heads),
        "D": normal(q_heads),
        "state": normal(rows, state_heads, n, p, dtype=torch.float64),
    }


def exact(given: dict[str, Any], fault: str | None = None) -> tuple[Tensor, Tensor]:
    """y of all tokens, (rows, TOKENS, width), and the last state, in fp64."""
    x = {name: None if value is None else value.double() for name, value in given.items()}
    n, p = x["state"].shape[2:]
    sizes = [x[name].shape[2] for name in ("q", "k", "v")]
    channels = torch.cat([x["q"], x["k"], x["v"]], dim=2)
    if x["weight"] is not None:
        weight = x["weight"].flip(1) if fault == "taps reversed" else x["weight"]
        channels = causal_conv1d(channels, weight, x["bias"], activation="silu", backend="torch")
    q, k, v = (part.unflatten(2, (-1, s)) for part, s in zip(channels.split(sizes, 2), (n, n, p), strict=True))
    dt = softplus(x["dt"] + (0 if fault == "bias of dt dropped" else x["dt_bias"]))
    y, state = ssd_scan(
        q, k, v, dt, -x["A_log"].exp(), x["D"], initial_state=x["state"], return_final_state=True, backend="torch"
    )
    y = y.flatten(2)
    return y if x["z"] is None or fault == "gate dropped" else y * silu(x["z"]), state


def step_through(given: dict[str, Any], backend: str, slots: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """The same, token by token; the first stands at position `start`."""
    rows, dtype = len(given["state"]), given["q"].dtype
    state = given["state"].to(torch.float64 if dtype == torch.float64 else torch.float32).clone()
    fixed = {name: given[name] for name in ("weight", "bias", "dt_bias", "A_log", "D")}
    ring = None
    if fixed["weight"] is not None:
        ring = torch.zeros(rows, slots, len(fixed["weight"]), dtype=dtype, device=DEVICE)
    outputs = []
    for t in range(TOKENS):
        token = [None if given[name] is None else given[name][:, t] for name in ("q", "k", "v", "dt", "z")]
        positions = torch.full((rows,), start + t, device=DEVICE)
        outputs.append(conv_ssd_step(state, ring, positions, *token, **fixed, backend=backend))
    return torch.stack(outputs, dim=1), state


def worst(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> float:
    return max(relative_rms_error(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_in_fp64_token_by_token_is_the_whole_row(backend: str, heads: tuple[int, int, int]) -> None:
    given = draw(heads)
    assert worst(step_through(given, backend, slots=4), exact(given)) < FP64_BOUND


@pytest.mark.parametrize(
    "form", [{"kernel": 0}, {"kernel": 1}, {"kernel": 7}, {"bias": False}, {"gate": False}], ids=str
)
@pytest.mark.parametrize("slots", [7, 11])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forms_of_the_layer_and_of_the_ring(backend: str, slots: int, form: dict[str, Any]) -> None:
    given = draw(**form, dtype=torch.float32)
    assert worst(step_through(given, backend, slots=slots, start=5), exact(given)) < 1e-5


@pytest.mark.parametrize("sizes", [(1, 1), (6, 5), (37, 40)], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@needs_triton
def test_the_kernel_at_all_heads_and_sizes(heads: tuple[int, int, int], sizes: tuple[int, int]) -> None:
    given = draw(heads, sizes=sizes, dtype=torch.float32)
    assert worst(step_through(given, "triton", slots=4), exact(given)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_inputs_round_in_fp32(backend: str, dtype: torch.dtype) -> None:
    given = draw((4, 2, 2), sizes=(16, 16), dtype=dtype)
    y, state = step_through(given, backend, slots=4)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    # The kernel rounds the output; the plain form the convolution per tap, with bias and SiLU, too.
    roundings = 3 if backend != "torch" else 8
    assert worst((y, state), exact(given)) < roundings * rounding(dtype) + 1e-6


@pytest.mark.parametrize("raw", [-60.0, -15.0, -9.9, 0.0, 19.9, 20.1, 50.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_of_any_size(backend: str, raw: float) -> None:
    given = draw(dtype=torch.float32)
    given["dt"] = torch.full_like(given["dt"], raw) - given["dt_bias"]
    given["A_log"] = given["A_log"] - raw / 8
    given["state"] = torch.zeros_like(given["state"])  # so that only what steps write is there
    assert worst(step_through(given, backend, slots=4), exact(given)) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_projections_may_be_slices_and_rows_none(backend: str) -> None:
    given = draw(dtype=torch.float32)
    wide = {name: torch.cat([given[name], given[name]], dim=2) for name in ("q", "k", "v", "dt", "z")}
    slices = given | {name: wide[name][..., : given[name].shape[2]] for name in wide}
    assert worst(step_through(slices, backend, slots=4), exact(given)) < 1e-5
    none = {name: x[:0] if name in (*wide, "state") else x for name, x in given.items()}
    assert step_through(none, backend, slots=4)[0].shape == (0, TOKENS, 20)


@pytest.mark.parametrize("fault", ["taps reversed", "bias of dt dropped", "gate dropped"])
def test_the_bounds_would_show_a_fault(fault: str) -> None:
    given = draw()
    assert worst(exact(given, fault), exact(given)) > FAULT_FACTOR * 3 * rounding(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 18)}, "1 heads of keys, 2 states and 3 of queries"),
        ({"v": torch.zeros(2, 6)}, r"v has shape \(2, 6\); give \(2, 5\)"),
        ({"ring": torch.zeros(2, 3, 35)}, r"ring has shape \(2, 3, 35\); give \(2, 4, 35\)"),
        ({"ring": None}, "needs both its ring and its weight"),
        ({"state": torch.zeros(2, 2, 6, 5).bfloat16()}, r"of dtype torch\.float32; it is torch\.bfloat16"),
        ({"D": torch.zeros(4, requires_grad=True)}, "in place, without gradients"),
    ],
)
def test_what_breaks_the_contract_is_named(change: dict[str, Any], message: str) -> None:
    given = draw(dtype=torch.float32)
    inputs = {name: x[:, 0].cpu() if x.dim() == 3 else x.cpu() for name, x in given.items()}
    inputs |= {"state": given["state"].float().cpu(), "ring": torch.zeros(2, 4, 35), "positions": torch.tensor([3, 9])}
    with pytest.raises(InputError, match=message):
        conv_ssd_step(**inputs | change)


@needs_triton
def test_it_is_an_op_of_torch() -> None:
    from transmamba.ops.conv_ssd_step.triton import conv_ssd_step_triton

    given = draw(dtype=torch.float32)
    token = [given[name][:, 0] for name in ("q", "k", "v", "dt", "z")]
    fixed = [given[name] for name in ("weight", "bias", "dt_bias", "A_log", "D")]
    ring, positions = torch.zeros(2, 4, 35, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    inputs = (given["state"].float(), ring, positions, *token, *fixed)
    torch.library.opcheck(conv_ssd_step_triton, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(64, 64), (96, 96), (128, 128), (256, 256), (37, 20)], ids=str)
@pytest.mark.parametrize("heads", [(16, 16, 16), (16, 8, 4)], ids=str)
def test_many_rows_on_a_card(heads: tuple[int, int, int], sizes: tuple[int, int], dtype: torch.dtype) -> None:
    given = draw(heads, sizes=sizes, rows=130, dtype=dtype)
    found = [step_through(given, "triton", slots=4) for _ in range(5)]
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))
    assert worst(found[0], exact(given)) < 3 * rounding(dtype) + 1e-5
