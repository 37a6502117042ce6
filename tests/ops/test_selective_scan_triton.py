"""The Triton backend of selective_scan against the matrix form: in Triton's interpreter, and compiled on a card."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import FAULT_FACTOR, FP64_BOUND, Inputs, gradients, in_double, rounding, worst_error
from tests.ops.kernels import needs_triton
from tests.ops.test_selective_scan import FAULTS, fp32_bound, oracle, selective_inputs
from transmamba.errors import InputError
from transmamba.ops import selective_scan

pytestmark = needs_triton

TOKENS = 4  # loaded at a time
scan = partial(selective_scan, return_last_state=True, backend="triton", delta_softplus=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def launches() -> Any:
    return import_module("transmamba.ops.selective_scan.launches")


@contextmanager
def tuned(monkeypatch: pytest.MonkeyPatch, **changes: int) -> Iterator[None]:
    """Launch with another configuration."""
    module, tuning_of = launches(), launches().tuning_of
    with monkeypatch.context() as patch:
        patch.setattr(module, "tuning_of", lambda state_size: replace(tuning_of(state_size), **changes))
        module._job.cache_clear()
        yield
    module._job.cache_clear()


def oracle_in_pieces(**inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix form of 16 tokens after 16, handing the state on: its memory is not quadratic in the length."""
    tokens, state, outputs = ("u", "delta", "B", "C", "z"), inputs["initial_state"], []
    for pieces in zip(*(inputs[name].split(16, dim=-1) for name in tokens), strict=True):
        y, state = oracle(**(inputs | dict(zip(tokens, pieces, strict=True)) | {"initial_state": state}))
        outputs.append(y)
    return torch.cat(outputs, dim=-1), state


def bound_of(inputs: Inputs) -> float:
    """fp32_bound, and on a card 2^-22 more at every token: what its exponential errs by at most."""
    on_card = 4 * 2**-24 * inputs["u"].shape[2] ** 0.5 if DEVICE.type == "cuda" else 0.0
    return fp32_bound(inputs) + on_card


def check(inputs: Inputs, exact: Callable[..., Any] = oracle) -> None:
    """Values and every gradient; those of 16 bits are rounded once besides."""
    dtype, bound = inputs["u"].dtype, bound_of(inputs)
    once = 0.0 if dtype == torch.float32 else rounding(dtype)
    y, state = scan(**inputs)
    exact_y, exact_state = exact(**in_double(inputs))
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert relative_rms_error(y, exact_y) < once + bound
    assert relative_rms_error(state, exact_state) < bound
    found, wanted = gradients(scan, inputs), gradients(exact, in_double(inputs))
    for name, a, b in zip([name for name, x in inputs.items() if x is not None], found, wanted, strict=True):
        assert relative_rms_error(a, b) < once + 4 * bound, name


@pytest.mark.parametrize("groups", [(None, None), (1, 1), (2, 2), (2, 3), (3, None)], ids=str)
def test_every_grouping(groups: tuple[int | None, int | None]) -> None:
    check(selective_inputs(groups=groups, seq_len=TOKENS + 1, batch=1, dtype=torch.float32))


@pytest.mark.parametrize("seq_len", [0, 1, TOKENS - 1, TOKENS, 3 * TOKENS + 1])
def test_every_length(seq_len: int) -> None:
    check(selective_inputs(groups=(1, 1), seq_len=seq_len, dtype=torch.float32))


def test_no_rows_at_all() -> None:
    check(selective_inputs(batch=0, dtype=torch.float32))


@pytest.mark.parametrize("seq_len", [4 * TOKENS + 3, 6 * TOKENS, 10 * TOKENS + 1])
def test_rows_cut_into_segments(monkeypatch: pytest.MonkeyPatch, seq_len: int) -> None:
    with tuned(monkeypatch, whole=10**6, programs=10**6):
        inputs = selective_inputs(groups=(None, 1), seq_len=seq_len, dtype=torch.float32, dim=3, batch=1, state_size=3)
        job = launches().Job.of(*(inputs[name] for name in ("u", "A", "B", "C")))
        assert job.whole == (seq_len < 6 * TOKENS)
        check(inputs)


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias", "initial_state"])
def test_optional_inputs_may_be_absent(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    inputs = partial(selective_inputs, groups=(1, 1), batch=1, leave_out=(absent,), dtype=torch.float32)
    check(inputs(seq_len=TOKENS + 1))
    with tuned(monkeypatch, whole=10**6, programs=10**6):
        check(inputs(seq_len=6 * TOKENS))


@pytest.mark.parametrize(
    ("state_size", "dim", "channels"), [(1, 1, 32), (2, 33, 32), (16, 33, 32), (17, 9, 16), (64, 5, 8)]
)
def test_every_state_size(state_size: int, dim: int, channels: int) -> None:
    assert launches().tuning_of(state_size).channels == channels
    check(selective_inputs(state_size=state_size, dim=dim, groups=(1, 1), seq_len=5, batch=1, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    inputs = selective_inputs(groups=(1, 1), seq_len=9, dtype=dtype)
    check(inputs)
    check(inputs | {name: inputs[name].float() for name in ("A", "D", "delta_bias", "initial_state")})


def test_steps_may_come_after_softplus() -> None:
    inputs = selective_inputs(groups=(1, 1), seq_len=9, dtype=torch.float32)
    inputs |= {"delta": softplus(inputs["delta"]), "delta_bias": inputs["delta_bias"].abs()}
    plain, exact = partial(scan, delta_softplus=False), partial(oracle, delta_softplus=False)
    assert worst_error(plain(**inputs), exact(**in_double(inputs))) < bound_of(inputs)
    assert worst_error(gradients(plain, inputs), gradients(exact, in_double(inputs))) < 4 * bound_of(inputs)


@pytest.mark.parametrize("raw", [-80.0, -20.0, -5.0, 0.0, 0.1, 5.0, 50.0])
def test_softplus_has_all_bits_at_every_size(raw: float) -> None:
    """One state that never decays, read after one step of u = 1: the step itself."""
    one = torch.ones(1, 1, 1, device=DEVICE)
    y = selective_scan(one, raw * one, 0 * one[0], one, one, delta_softplus=True, backend="triton")
    exact = softplus(torch.tensor(raw, dtype=torch.float64))
    assert relative_rms_error(y.flatten(), exact[None]) < 2**-21  # the exponential's 2^-22, and the sum's roundings


def test_vanishing_decays_forget_and_stay_finite() -> None:
    inputs = selective_inputs(groups=(1, 1), seq_len=9, dtype=torch.float32)
    inputs |= {"A": inputs["A"] - 1000.0}
    assert worst_error(scan(**inputs), oracle(**in_double(inputs))) < 1000 * bound_of(inputs)
    assert all(torch.isfinite(x).all() for x in gradients(scan, inputs))


def test_any_strides_are_read_and_no_input_is_written() -> None:
    inputs = selective_inputs(seq_len=6, groups=(1, None), dtype=torch.float32)
    names = ("u", "delta", "z", "B", "C")
    strided = {name: inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in names}
    strided |= {"A": inputs["A"].T.contiguous().T, "D": inputs["D"].repeat_interleave(2)[::2]}
    strided["initial_state"] = inputs["initial_state"].transpose(0, 2).contiguous().transpose(0, 2)
    kept = {name: x.clone() for name, x in strided.items()}
    assert strided["u"].stride(1) == 1
    given = inputs | strided
    check(given)
    assert all(torch.equal(strided[name], kept[name]) for name in kept)
    check(given | {"delta": inputs["delta"][:, :1].expand(-1, 6, -1), "z": inputs["z"][..., :1].expand(-1, -1, 6)})


def test_gradients_of_any_strides_are_understood() -> None:
    inputs = selective_inputs(seq_len=6, groups=(1, 1), dtype=torch.float32)

    def summed(op: Any, **leaves: Tensor) -> Tensor:
        return op(**leaves)[0].sum()  # its gradient is one number, of no strides

    found, wanted = (gradients(partial(summed, op), x) for op, x in ((scan, inputs), (oracle, in_double(inputs))))
    assert worst_error(found, wanted) < 4 * bound_of(inputs)


def test_the_state_alone_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = selective_inputs(seq_len=6 * TOKENS, groups=(1, 1), batch=1, dtype=torch.float32)

    def state(op: Any, **leaves: Tensor) -> Tensor:
        return op(**leaves)[1]

    wanted = gradients(partial(state, oracle), in_double(inputs))
    for cut in ({}, {"whole": 10**6, "programs": 10**6}):
        with tuned(monkeypatch, **cut):
            assert worst_error(gradients(partial(state, scan), inputs), wanted) < 4 * bound_of(inputs)


def test_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = selective_inputs(seq_len=6 * TOKENS, groups=(1, 1), batch=1, dtype=torch.float32)
    with tuned(monkeypatch, whole=10**6, programs=10**6):
        runs = [(*scan(**inputs), *gradients(scan, inputs)) for _ in range(5 if DEVICE.type == "cuda" else 2)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("leave_out", [(), ("D", "z", "delta_bias", "initial_state")], ids=["all", "few"])
def test_torch_knows_the_op(leave_out: tuple[str, ...]) -> None:
    from transmamba.ops.selective_scan.triton import selective_scan_op

    inputs = selective_inputs(seq_len=5, groups=(1, None), leave_out=leave_out, dtype=torch.float32)
    tensors = [None if x is None else x.requires_grad_() for x in inputs.values()]
    torch.library.opcheck(selective_scan_op, (*tensors, True))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_bound_would_show_a_wrong_recurrence(fault: str) -> None:
    inputs = selective_inputs(seq_len=3 * TOKENS + 1)
    wrong, exact = oracle(**inputs, fault=fault), oracle(**inputs)
    assert relative_rms_error(wrong[0], exact[0]) > FAULT_FACTOR * (rounding(torch.bfloat16) + bound_of(inputs))


def test_a_segment_that_forgot_the_one_before_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = selective_inputs(seq_len=6 * TOKENS, groups=(1, 1), batch=1, dtype=torch.float32)
    recur = launches()._recur

    def forgetful(*args: Any, reverse: bool) -> Tensor:
        states = recur(*args, reverse=reverse)
        return states.zero_() if reverse else states

    exact = gradients(oracle, in_double(inputs))
    with tuned(monkeypatch, whole=10**6, programs=10**6):
        monkeypatch.setattr(launches(), "_recur", forgetful)
        assert worst_error(gradients(scan, inputs), exact) > FAULT_FACTOR * 4 * bound_of(inputs)


def test_what_the_kernels_cannot_do_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match="the inputs are float64; pass backend='torch', or None"):
        scan(**selective_inputs())
    with pytest.raises(InputError, match="for state_size up to 64, and here it is 65"):
        scan(**selective_inputs(state_size=65, dtype=torch.float32))


def test_the_matrix_in_pieces_is_the_whole_matrix() -> None:
    inputs = selective_inputs(seq_len=37, groups=(1, 1))
    assert worst_error(oracle_in_pieces(**inputs), oracle(**inputs)) < FP64_BOUND
    assert worst_error(gradients(oracle_in_pieces, inputs), gradients(oracle, inputs)) < FP64_BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_size", [1, 2, 3, 4, 8, 13, 16, 17, 32, 48, 64])
def test_every_state_size_on_a_card(state_size: int, dtype: torch.dtype) -> None:
    check(selective_inputs(state_size=state_size, dim=100, groups=(2, 1), seq_len=77, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("batch", "seq_len"), [(8, 197), (8, 64), (8, 65), (1, 1568)])
def test_the_shapes_of_models_on_a_card(
    monkeypatch: pytest.MonkeyPatch, batch: int, seq_len: int, dtype: torch.dtype, cut: bool
) -> None:
    """dim 96 of ViM's 384 and VideoMamba's 768: the matrix form holds 16 numbers per token, channel and state."""
    inputs = selective_inputs(batch=batch, dim=96, state_size=16, seq_len=seq_len, groups=(1, 1), dtype=dtype)
    with tuned(monkeypatch, **({"whole": 10**6, "programs": 10**6} if cut else {"whole": 1})):
        check(inputs, oracle_in_pieces)
        runs = [(*scan(**inputs), *gradients(scan, inputs)) for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count() -> None:
    """2^31 and some in u, delta and y, 4 GiB each: the last tokens equal those of a short scan from the same state."""
    batch, dim, seq_len, tail = 2, 4096, 2**18 + 5, 100
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    inputs = selective_inputs(batch=batch, dim=dim, state_size=1, seq_len=tail, groups=(1, 1), dtype=torch.bfloat16)
    long = {}
    for name in ("u", "delta", "B", "C"):
        short = inputs[name]
        x = torch.zeros(*short.shape[:-2], seq_len, short.shape[-2], device=DEVICE, dtype=torch.bfloat16)
        x[..., -tail:, :] = short.transpose(-1, -2)
        long[name] = x.transpose(-1, -2)
    assert long["u"].numel() > 2**31
    # u = 0 before the tail, so that the state there is still zero.
    shared = {name: inputs[name] for name in ("A", "D", "delta_bias")}
    y, state = scan(**long, **shared)
    y_short, state_short = scan(**{name: inputs[name] for name in long}, **shared)
    bound = 2 * bound_of(inputs)
    assert relative_rms_error(y[..., -tail:], y_short) < 2 * rounding(torch.bfloat16) + bound
    assert relative_rms_error(state, state_short) < bound
