"""The compiled kernels at the sizes that models have: every shape family that is shipped, against fp64 on the card.

Triton 3.4 to 3.7.0 compiles some gated backward kernels wrongly on Hopper (github.com/fla-org/flash-linear-attention,
issue 640), for single block sizes and layouts only. So each family's gradients are compared, and not one's alone.
"""

from functools import partial

import pytest
import torch

from tests.helpers import relative_rms_error
from tests.ops.cases import FAULT_FACTOR, gradients, in_double, ssd_inputs, without
from tests.ops.kernels import gradient_names, launches, needs_triton, rate_error, scan_bound, tuned
from tests.ops.oracle import oracle_scan
from transmamba.ops import memory_converter, ssd_scan

pytestmark = [needs_triton, pytest.mark.gpu]

HEADS = {
    "equal": (2, 2, 2, 2),
    "grouped-query": (4, 2, 2, 4),
    "shared states": (4, 2, 2, 2),
    "mamba2": (1, 1, 4, 4),
    "not nested": (2, 3, 6, 6),
}
SIZES = [16, 20, 32, 37, 48, 64, 80, 96, 128, 192, 256]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BORDERS = [0, 0, 1, 2, 2, 70, 500, 500]
scan = partial(ssd_scan, return_final_state=True, backend="triton")
convert = partial(memory_converter, backend="triton")


def oracle_state(k, v, dt, A, **options):
    return oracle_scan(k, k, v, dt, A, **options)[1]


def check(dtype: torch.dtype, heads, *, borders=None, **shape) -> None:
    if borders is not None:
        shape |= {"batch": 1, "seq_len": borders[-1], "rows": len(borders) - 1}
    inputs = ssd_inputs(heads, dtype=dtype, **shape)
    inputs |= {name: inputs[name].float() for name in ("dt", "A", "D", "initial_state") if inputs[name] is not None}
    for op, exact, given in (
        (scan, oracle_scan, inputs),
        (convert, oracle_state, without(inputs, "q", "D")),
    ):
        found, wanted = op(**given, cu_seqlens=borders), exact(**in_double(given), cu_seqlens=borders)
        pairs = zip(found, wanted, strict=True) if op is scan else [(found, wanted)]
        assert all(relative_rms_error(a, b) < scan_bound(inputs, dtype, 3) for a, b in pairs)
        found = gradients(op, given, cu_seqlens=borders)
        wanted = gradients(exact, in_double(given), cu_seqlens=borders)
        for name, a, b in zip(gradient_names(given), found, wanted, strict=True):
            of_A = name == "A"
            error = rate_error(a, given, exact, cu_seqlens=borders) if of_A else relative_rms_error(a, b)
            if of_A and not b.any():  # no state is left to decay: what remains is rounding in sums that dt's is made of
                of_steps = wanted[gradient_names(given).index("dt")] * given["dt"]
                error = a.double().abs().sum() / of_steps.abs().sum()
            if name == "initial_state" and b.abs().max() < 1e-6:
                continue  # the loss hardly depends on a state that has decayed by as much
            assert error < scan_bound(inputs, dtype, 5), (op, name)
        again = gradients(op, given, cu_seqlens=borders)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size: int, dtype: torch.dtype) -> None:
    check(dtype, HEADS["grouped-query"], seq_len=261, state_size=size, head_dim=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("state_size", "head_dim"),
    [(64, 128), (128, 64), (20, 37), (16, 256), (33, 32), (64, 16), (128, 32), (256, 48), (32, 16)],
)
def test_states_need_not_be_square(state_size: int, head_dim: int, dtype: torch.dtype) -> None:
    check(dtype, HEADS["grouped-query"], seq_len=261, state_size=state_size, head_dim=head_dim)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_head_count(heads: tuple[int, int, int, int], size: int, dtype: torch.dtype) -> None:
    check(dtype, heads, seq_len=300, state_size=size, head_dim=size)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("borders", [None, BORDERS], ids=["dense", "packed"])
@pytest.mark.parametrize("programs", [1, 10**6], ids=["whole rows", "cut rows"])
def test_rows_in_one_segment_or_several(monkeypatch, programs: int, borders: list[int] | None, size: int) -> None:
    with tuned(monkeypatch, programs=programs):
        shape = {"seq_len": 1100} if borders is None else {}
        check(torch.bfloat16, HEADS["grouped-query"], borders=borders, state_size=size, head_dim=size, **shape)


@pytest.mark.parametrize("seq_len", [1, 300])
@pytest.mark.parametrize("size", [64, 128])
def test_without_skip_and_state(size: int, seq_len: int) -> None:
    shape = {"seq_len": seq_len, "state_size": size, "head_dim": size}
    check(torch.bfloat16, HEADS["grouped-query"], **shape, skip=False, state=False)


@pytest.mark.parametrize("size", [64, 128])
def test_a_wrong_gradient_of_states_would_be_seen(monkeypatch, size: int) -> None:
    """The fault that a miscompiled product would leave: a quarter of dh's columns in their neighbours' places."""
    module = launches()
    carry = module._carry

    def wrong(*args, reverse=False, **options):
        states, left, log_decay = carry(*args, reverse=reverse, **options)
        if reverse and options.get("chunks"):
            quarter = size // 4
            states[..., :quarter] = states[..., :quarter].roll(1, -1)
        return states, left, log_decay

    inputs = ssd_inputs((2, 2, 2, 2), dtype=torch.bfloat16, seq_len=300, state_size=size, head_dim=size)
    exact = gradients(oracle_scan, in_double(inputs))
    monkeypatch.setattr(module, "_carry", wrong)
    with module.configured(sweeps=None):
        found = gradients(scan, inputs)
    errors = [relative_rms_error(a, b) for a, b in zip(found, exact, strict=True)]
    assert max(errors[:3]) > FAULT_FACTOR * scan_bound(inputs, torch.bfloat16, 5)


@pytest.mark.parametrize(("part", "places"), [("states", 1), ("sums", 8)])
@pytest.mark.parametrize("size", [64, 128])
def test_a_sweep_with_a_wrong_product_would_be_seen(monkeypatch, size: int, part: str, places: int) -> None:
    """Columns of states, or the tokens that a sum is for, some places further. States outlast a chunk."""
    module = launches()
    sweep = module._sweep

    def wrong(*args, **options):
        sweep(*args, **options)
        handed = options.get(part)
        if handed is not None and options.get("flows") is None:
            handed.copy_(handed.roll(places, -1))

    inputs = ssd_inputs((2, 2, 2, 2), dtype=torch.bfloat16, seq_len=300, state_size=size, head_dim=size)
    inputs["dt"] = 0.05 * inputs["dt"]
    exact = gradients(oracle_scan, in_double(inputs))
    monkeypatch.setattr(module, "_sweep", wrong)
    found = gradients(scan, inputs)
    steps = gradient_names(inputs).index("dt")
    assert relative_rms_error(found[steps], exact[steps]) > FAULT_FACTOR * scan_bound(inputs, torch.bfloat16, 5)


def test_more_elements_than_32_bits_count() -> None:
    """2^31 and some in q, y and the gradients: the last tokens equal those of a short scan from the same state."""
    seq_len, heads, size, tail = 131_072 + 64, 128, 128, 300
    device, dtype = torch.device("cuda"), torch.bfloat16
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 70 GiB of free GPU memory")
    q = torch.randn(1, seq_len, heads, size, device=device, dtype=dtype).mul_(size**-0.5)
    k, v = (torch.randn(1, seq_len, 1, size, device=device, dtype=dtype) for _ in range(2))
    dt = torch.rand(1, seq_len, heads, device=device) * 0.1
    A = -torch.rand(heads, device=device) - 0.01
    leaves = [x.requires_grad_() for x in (q, k, v, dt)]
    y, state = scan(*leaves, A)
    assert y.numel() > 2**31
    weights = torch.randn(1, tail, heads, size, device=device, dtype=dtype)
    dy = torch.zeros_like(y)
    dy[:, -tail:] = weights
    found = torch.autograd.grad(y, leaves, dy)
    del dy
    with torch.no_grad():
        middle = scan(*(x[:, :-tail] for x in leaves), A)[1]
    short = [x[:, -tail:].detach().requires_grad_() for x in leaves]
    y_short, state_short = scan(*short, A, initial_state=middle)
    wanted = torch.autograd.grad(y_short, short, weights)
    # Chunks lie otherwise in the short scan, so every operand is rounded anew: both sides are as far off as a bound.
    bound = 2 * scan_bound({"k": k[:, -tail:], "dt": dt[:, -tail:], "A": A}, dtype, 5)
    assert relative_rms_error(y[:, -tail:], y_short) < bound
    assert relative_rms_error(state, state_short) < bound
    assert all(relative_rms_error(a[:, -tail:], b) < bound for a, b in zip(found, wanted, strict=True))
