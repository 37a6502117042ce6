"""selective_scan: the recurrence in every layout, its gradients, its rounding; and that a wrong one would be seen."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, Inputs, gradients, in_double, rounding, worst_error
from transmamba.errors import InputError
from transmamba.ops import selective_scan, ssd_scan
from transmamba.ops.selective_scan import selective_scan_reference, selective_scan_torch

BACKENDS = ("reference", "torch")
FAULTS = ("no decay", "no step", "index shifted", "no skip", "channels in turn", "states in turn", "no gate")
LENGTHS = (0, 1, 2, 7, 15, 16, 17, 53)
scan = partial(selective_scan, return_last_state=True)


def selective_inputs(
    *,
    batch: int = 2,
    dim: int = 6,
    state_size: int = 5,
    seq_len: int = 7,
    groups: tuple[int | None, int | None] = (2, 2),
    dtype: torch.dtype = torch.float64,
    device: torch.device = DEVICE,
    leave_out: tuple[str, ...] = (),
) -> Inputs:
    """Tensors only. groups of B and C: None is the layout without them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    written, read = (normal(batch, *(() if count is None else (count,)), state_size, seq_len) for count in groups)
    exact = {
        "u": normal(batch, dim, seq_len),
        "delta": normal(batch, dim, seq_len) - 1,
        "A": -torch.exp(normal(dim, state_size) - 1),
        "B": written,
        "C": read,
        "D": normal(dim),
        "z": normal(batch, dim, seq_len),
        "delta_bias": normal(dim),
        "initial_state": normal(batch, dim, state_size),
    }
    return {name: None if name in leave_out else x.to(device, dtype) for name, x in exact.items()}


def oracle(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    delta_softplus: bool = True,
    fault: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, last state) from the matrix of what token j adds to token t, in fp64, sharing no code with the package."""
    batch, dim, seq_len = u.shape
    u, delta, A = u.double(), delta.double(), A.double()
    step = delta if delta_bias is None else delta + delta_bias.double()[:, None]
    step = softplus(step) if delta_softplus else step
    writes, reads = (_spread(x.double(), dim, fault) for x in (B, C))  # (batch, dim, state_size, seq_len)
    rate = A.flip(1) if fault == "states in turn" else A
    S = step.cumsum(-1).unsqueeze(2) * (rate * (0.0 if fault == "no decay" else 1.0)).unsqueeze(-1)
    S = S.roll(1, -1) if fault == "index shifted" else S
    future = torch.ones(seq_len, seq_len, dtype=torch.bool, device=u.device).triu(1)
    decay = (S.unsqueeze(-1) - S.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()  # batch, dim, state, t, j
    written = writes * (u if fault == "no step" else step * u).unsqueeze(2)
    y = torch.einsum("bdnt,bdntj,bdnj->bdt", reads, decay, written)
    if seq_len:
        state = torch.einsum("bdnj,bdnj->bdn", decay[..., -1, :], written)
    else:
        state = u.new_zeros(batch, dim, A.shape[1])
    if initial_state is not None:
        first = initial_state.double()
        y = y + torch.einsum("bdnt,bdnt,bdn->bdt", reads, S.exp(), first)
        state = state + (S[..., -1].exp() * first if seq_len else first)
    if D is not None and fault != "no skip":
        y = y + D.double()[:, None] * u
    if z is not None and fault != "no gate":
        y = y * silu(z.double())
    return y, state


def _spread(x: Tensor, dim: int, fault: str | None) -> Tensor:
    x = x.unsqueeze(1) if x.dim() == 3 else x
    channel = torch.arange(dim)
    count = x.shape[1]
    return x[:, channel % count if fault == "channels in turn" else channel * count // dim]


def fp32_bound(inputs: Inputs) -> float:
    """u (sqrt(additions) + 3 sqrt(seq_len)), u = 2^-24: a token passes at most seq_len decays, of three roundings each
    (exponent, exponential, product), whose errors are random; and an output is a sum over states and tokens.
    """
    seq_len = inputs["u"].shape[2]
    return 2**-24 * ((inputs["A"].shape[1] + seq_len) ** 0.5 + 3 * seq_len**0.5) + 2**-23


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("groups", [(None, None), (1, 1), (2, 2), (6, 6), (2, 3), (None, 2), (6, 1)], ids=str)
def test_every_length_and_grouping_equals_the_matrix(groups: tuple[int | None, int | None], seq_len: int) -> None:
    inputs = selective_inputs(groups=groups, seq_len=seq_len)
    exact = oracle(**inputs)
    for backend in BACKENDS:
        assert worst_error(scan(**inputs, delta_softplus=True, backend=backend), exact) < FP64_BOUND


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "initial_state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_inputs_may_be_absent(backend: str, absent: str) -> None:
    inputs = selective_inputs(seq_len=18, leave_out=(absent,))
    exact = oracle(**inputs)
    assert worst_error(scan(**inputs, delta_softplus=True, backend=backend), exact) < FP64_BOUND
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert relative_rms_error(y, exact[0]) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_may_come_after_softplus(backend: str) -> None:
    inputs = selective_inputs(seq_len=9)
    inputs |= {"delta": softplus(inputs["delta"]), "delta_bias": inputs["delta_bias"].abs()}
    exact = oracle(**inputs, delta_softplus=False)
    assert worst_error(scan(**inputs, backend=backend), exact) < FP64_BOUND


def test_arguments_stand_in_the_order_of_mamba_ssm() -> None:
    inputs = selective_inputs()
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    y, _ = selective_scan(*(inputs[name] for name in names), True, inputs["initial_state"], return_last_state=True)
    assert relative_rms_error(y, oracle(**inputs)[0]) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [{"batch": 0}, {"seq_len": 0}], ids=str)
def test_nothing_gives_nothing_and_the_state_stays(shape: dict[str, int], backend: str) -> None:
    inputs = selective_inputs(**shape)
    y, state = scan(**inputs, delta_softplus=True, backend=backend)
    assert y.shape == inputs["u"].shape
    assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize(("chunk_size", "rows"), [(1, 1), (2, 2), (5, 1), (16, 3), (37, 2), (1000, 1000)])
def test_chunks_and_rows_do_not_change_the_result(chunk_size: int, rows: int) -> None:
    inputs = selective_inputs(batch=3, seq_len=37)
    blocked = partial(selective_scan_torch, delta_softplus=True, chunk_size=chunk_size, rows=rows)
    assert worst_error(blocked(**inputs), oracle(**inputs)) < FP64_BOUND
    assert worst_error(gradients(blocked, inputs), gradients(oracle, inputs)) < FP64_BOUND


@pytest.mark.parametrize(("state_size", "dim"), [(1, 1), (1, 6), (17, 2), (2, 130)])
def test_state_size_and_channels_are_independent(state_size: int, dim: int) -> None:
    inputs = selective_inputs(state_size=state_size, dim=dim, groups=(1, None), seq_len=19)
    assert worst_error(scan(**inputs, delta_softplus=True), oracle(**inputs)) < FP64_BOUND


@pytest.mark.parametrize("cut", [0, 1, 16, 17, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_cut_anywhere_equals_the_whole(backend: str, cut: int) -> None:
    inputs = selective_inputs(seq_len=40)
    tokens = ("u", "delta", "B", "C", "z")
    run = partial(scan, delta_softplus=True, backend=backend)
    y_before, state = run(**(inputs | {name: inputs[name][..., :cut] for name in tokens}))
    after = inputs | {name: inputs[name][..., cut:] for name in tokens} | {"initial_state": state}
    y_after, state = run(**after)
    assert worst_error((torch.cat([y_before, y_after], dim=-1), state), run(**inputs)) < FP64_BOUND


def test_strided_inputs_are_read_and_no_input_is_written() -> None:
    inputs = selective_inputs(seq_len=21)
    strided = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("u", "delta", "z")}
    kept = {name: x.clone() for name, x in inputs.items()}
    assert not strided["u"].is_contiguous()
    assert worst_error(scan(**(inputs | strided), delta_softplus=True), oracle(**inputs)) < FP64_BOUND
    assert all(torch.equal(inputs[name], kept[name]) for name in inputs)


@pytest.mark.parametrize("groups", [(None, None), (2, 1)], ids=str)
@pytest.mark.parametrize(
    "implementation", [selective_scan_reference, partial(selective_scan_torch, chunk_size=2, rows=1)], ids=BACKENDS
)
def test_gradients_are_those_of_finite_differences(implementation: Any, groups: tuple[int | None, int | None]) -> None:
    inputs = selective_inputs(dim=2, state_size=2, seq_len=5, groups=groups, device=torch.device("cpu"))
    leaves = [x.requires_grad_() for x in inputs.values()]

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor]:
        return implementation(**dict(zip(inputs, values, strict=True)), delta_softplus=True)

    assert torch.autograd.gradcheck(outputs, tuple(leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_those_of_the_matrix(backend: str) -> None:
    inputs = selective_inputs(seq_len=45, groups=(2, 3))
    found = gradients(scan, inputs, delta_softplus=True, backend=backend)
    assert worst_error(found, gradients(oracle, inputs)) < FP64_BOUND


def test_the_state_alone_has_gradients() -> None:
    inputs = selective_inputs(seq_len=20)

    def state(op: Any, **leaves: Tensor) -> Tensor:
        return op(**leaves)[1]

    found = gradients(partial(state, partial(scan, delta_softplus=True)), inputs)
    assert worst_error(found, gradients(partial(state, oracle), inputs)) < FP64_BOUND


def test_the_op_is_one_to_torch() -> None:
    op = torch.ops.transmamba.selective_scan.default
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 2, 1, 3), (7, 2, 1, 3), (1, 4, 3), (7, 2, 1, 4), (7, 2, 1, 4), (2, 1, 4, 3)]
    tensors = [torch.rand(shape, generator=generator).requires_grad_() for shape in shapes]
    torch.library.opcheck(op, (*tensors, 3, 1), test_utils=("test_schema", "test_autograd_registration"))


@pytest.mark.parametrize("state_size", [1, 16])
def test_fp32_errs_by_rounding_only(state_size: int) -> None:
    inputs = selective_inputs(seq_len=200, state_size=state_size, dtype=torch.float32)
    exact = oracle(**in_double(inputs))
    bound = fp32_bound(inputs)
    for backend in BACKENDS:
        assert worst_error(scan(**inputs, delta_softplus=True, backend=backend), exact) < bound
    found = gradients(scan, inputs, delta_softplus=True)
    assert worst_error(found, gradients(oracle, in_double(inputs))) < 4 * bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits_round_the_output_once(backend: str, dtype: torch.dtype) -> None:
    inputs = selective_inputs(seq_len=40, dtype=dtype)
    y, state = scan(**inputs, delta_softplus=True, backend=backend)
    exact_y, exact_state = oracle(**in_double(inputs))
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert relative_rms_error(y, exact_y) < rounding(dtype) + fp32_bound(inputs)
    assert relative_rms_error(state, exact_state) < fp32_bound(inputs)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_bound_would_show_a_wrong_recurrence(fault: str) -> None:
    inputs = selective_inputs(seq_len=40)
    exact, wrong = oracle(**inputs), oracle(**inputs, fault=fault)
    assert relative_rms_error(wrong[0], exact[0]) > FAULT_FACTOR * (rounding(torch.bfloat16) + fp32_bound(inputs))
    errors = [
        relative_rms_error(w, e)
        for w, e in zip(gradients(oracle, inputs, fault=fault), gradients(oracle, inputs), strict=True)
    ]
    assert max(errors) > FAULT_FACTOR * 4 * fp32_bound(inputs)


def test_vanishing_decays_forget_and_stay_finite() -> None:
    """Running products are exp(-60,000): what divides by them gives NaN."""
    inputs = selective_inputs(seq_len=60, dtype=torch.float32)
    inputs |= {"A": inputs["A"] - 1000.0}
    exact = oracle(**in_double(inputs))
    assert worst_error(scan(**inputs, delta_softplus=True), exact) < 1000 * fp32_bound(inputs)  # exponents near 1,000
    assert all(torch.isfinite(x).all() for x in gradients(scan, inputs, delta_softplus=True))
    step = softplus(inputs["delta"] + inputs["delta_bias"][:, None])
    products = torch.exp((step.unsqueeze(2) * inputs["A"].unsqueeze(-1)).cumsum(-1))
    assert not torch.isfinite(1 / products).all()


def test_one_state_of_one_rate_per_head_is_the_recurrence_of_mamba_2() -> None:
    inputs = selective_inputs(seq_len=23, groups=(1, 1), leave_out=("z", "delta_bias"))
    step, rate = inputs["delta"][:, :1].exp(), inputs["A"][0, 0]
    y, state = scan(
        inputs["u"],
        step.expand_as(inputs["u"]),
        rate.expand_as(inputs["A"]),
        inputs["B"],
        inputs["C"],
        initial_state=inputs["initial_state"],
    )
    q, k = (inputs[name].transpose(2, 3).transpose(1, 2) for name in ("C", "B"))
    v = inputs["u"].transpose(1, 2).unsqueeze(2)
    first = inputs["initial_state"].transpose(1, 2).unsqueeze(1)
    y_2, state_2 = ssd_scan(q, k, v, step.transpose(1, 2), rate[None], initial_state=first, return_final_state=True)
    assert relative_rms_error(y.transpose(1, 2), y_2.squeeze(2)) < FP64_BOUND
    assert relative_rms_error(state.transpose(1, 2), state_2.squeeze(1)) < FP64_BOUND


def test_without_decay_and_with_unit_steps_it_is_linear_attention() -> None:
    inputs = selective_inputs(seq_len=12, groups=(None, None))
    u, B, C = inputs["u"], inputs["B"], inputs["C"]
    y = selective_scan(u, torch.ones_like(u), torch.zeros_like(inputs["A"]), B, C)
    scores = torch.einsum("bnt,bnj->btj", C, B).tril()
    assert relative_rms_error(y, torch.einsum("btj,bdj->bdt", scores, u)) < FP64_BOUND


@pytest.mark.parametrize(
    ("name", "shape", "fragments"),
    [
        ("u", (6, 7), ("u has shape (6, 7)", "(batch, dim, seq_len)")),
        ("A", (6,), ("A has shape (6,)", "u has 6 channels")),
        ("A", (5, 5), ("A has shape (5, 5)", "u has 6 channels")),
        ("B", (2, 2, 4, 7), ("B has shape (2, 2, 4, 7)", "(2, 5, 7)")),
        ("C", (2, 4, 5, 7), ("C has 4 groups", "6 channels")),
        ("C", (2, 5, 8), ("C has shape (2, 5, 8)", "(2, 5, 7)")),
        ("delta", (2, 6, 8), ("delta has shape (2, 6, 8)", "(2, 6, 7)", "like u")),
        ("z", (2, 7, 6), ("z has shape (2, 7, 6)", "or None")),
        ("D", (6, 5), ("D has shape (6, 5)", "(6,)", "one number per channel")),
        ("delta_bias", (1,), ("delta_bias has shape (1,)", "(6,)")),
        ("initial_state", (2, 5, 6), ("initial_state has shape (2, 5, 6)", "(2, 6, 5)")),
    ],
    ids=str,
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], fragments: tuple[str, ...]) -> None:
    inputs = selective_inputs() | {name: torch.zeros(shape, dtype=torch.float64, device=DEVICE)}
    with pytest.raises(InputError) as caught:
        selective_scan(**inputs, delta_softplus=True)
    message = str(caught.value)
    assert "\n" not in message
    assert [fragment for fragment in ("selective_scan", *fragments) if fragment not in message] == [], message


def test_rates_and_steps_out_of_range_are_refused() -> None:
    inputs = selective_inputs(device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"A holds 0\.5; no entry may be > 0\. Pass A = -exp\(A_log\)"):
        selective_scan(**(inputs | {"A": inputs["A"].clone().fill_(0.5)}), delta_softplus=True)
    with pytest.raises(InputError, match=r"add up to -.*; steps must be >= 0\. Pass delta_softplus=True"):
        selective_scan(**inputs)
    selective_scan(**inputs, validate=False)
