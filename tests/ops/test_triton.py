"""The Triton backends of ssd_scan, memory_converter and hybrid_mixer against the matrix form, in Triton's interpreter.

On a CUDA device the same tests run the compiled kernels.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import (
    FAULT_FACTOR,
    HEADS,
    Inputs,
    fp32_bound,
    gradients,
    in_double,
    rounding,
    ssd_inputs,
    without,
    worst_error,
)
from tests.ops.kernels import gradient_names, launches, needs_triton, rate_error, scan_bound, tuned
from tests.ops.oracle import FAULTS, oracle_hybrid, oracle_scan
from transmamba.errors import InputError
from transmamba.ops import hybrid_mixer, memory_converter, ssd_scan

pytestmark = needs_triton

CHUNK = 16 if DEVICE.type == "cpu" else 32  # of the table for fp32
GROUPED = (4, 2, 2, 4)
scan = partial(ssd_scan, return_final_state=True, backend="triton")
convert = partial(memory_converter, backend="triton")
UNEVEN = [0, 0, 1, 2, 2, 5, 6 * CHUNK + 4, 6 * CHUNK + 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def short_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chunks of 16 tokens and blocks of 16 columns, so that small inputs, quick to interpret, cross many of both.

    A GPU runs what it always runs, on inputs twice as long.
    """
    if request.node.get_closest_marker("gpu") or DEVICE.type != "cpu":
        yield
    else:
        with tuned(monkeypatch, chunk=CHUNK, block=16):
            yield


def oracle_state(k: Tensor, v: Tensor, dt: Tensor, A: Tensor, **options: Any) -> Tensor:
    return oracle_scan(k, k, v, dt, A, **options)[1]


def check_scan(inputs: Inputs, borders: list[int] | None = None) -> None:
    """Values and gradients within the bound of fp32."""
    bound = fp32_bound(inputs, chunk=32)
    exact = oracle_scan(**in_double(inputs), cu_seqlens=borders)
    assert worst_error(scan(**inputs, cu_seqlens=borders), exact) < bound
    exact_gradients = gradients(oracle_scan, in_double(inputs), cu_seqlens=borders)
    assert worst_error(gradients(scan, inputs, cu_seqlens=borders), exact_gradients) < 4 * bound


def check_converter(inputs: Inputs, borders: list[int] | None = None) -> None:
    inputs, bound = without(inputs, "q", "D"), fp32_bound(inputs, chunk=32)
    state = convert(**inputs, cu_seqlens=borders)
    assert relative_rms_error(state, oracle_state(**in_double(inputs), cu_seqlens=borders)) < bound
    exact_gradients = gradients(oracle_state, in_double(inputs), cu_seqlens=borders)
    assert worst_error(gradients(convert, inputs, cu_seqlens=borders), exact_gradients) < 4 * bound


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_head_count(heads: tuple[int, int, int, int]) -> None:
    inputs = ssd_inputs(heads, batch=1, seq_len=2 * CHUNK + 3, dtype=torch.float32)
    check_scan(inputs)
    check_converter(inputs)


@pytest.mark.parametrize("seq_len", [0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 53])
def test_every_length(seq_len: int) -> None:
    inputs = ssd_inputs((2, 1, 1, 2), seq_len=seq_len, dtype=torch.float32)
    check_scan(inputs)
    check_converter(inputs)


@pytest.mark.parametrize(("state_size", "head_dim"), [(1, 1), (16, 20), (37, 3), (40, 64)])
def test_sizes_that_fill_no_block(state_size: int, head_dim: int) -> None:
    shape = {"seq_len": CHUNK + 2, "state_size": state_size, "head_dim": head_dim}
    inputs = ssd_inputs((2, 1, 1, 2), batch=1, **shape, dtype=torch.float32)
    check_scan(inputs)
    check_converter(inputs)


@pytest.mark.parametrize("segments", ["whole rows", "cut rows"])
@pytest.mark.parametrize("borders", [None, UNEVEN, [0, 0, 0]], ids=["dense", "uneven", "nothing"])
@pytest.mark.parametrize("heads", [GROUPED, (4, 1, 2, 2)], ids=["a state per head", "shared states"])
def test_rows_in_one_segment_or_several(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int, int, int], borders: list[int] | None, segments: str
) -> None:
    shape = {"batch": 1, "seq_len": borders[-1], "rows": len(borders) - 1} if borders else {"seq_len": 6 * CHUNK + 1}
    inputs = ssd_inputs(heads, **shape, dtype=torch.float32)
    with tuned(monkeypatch, programs=10**6 if segments == "cut rows" else 1):
        cut = launches().Job.of(heads[0], inputs["k"], inputs["v"], inputs["dt"], borders).segments
        assert cut.whole_rows == (segments == "whole rows" or borders == [0, 0, 0])
        check_scan(inputs, borders)
        check_converter(inputs, borders)


@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("skip", [False, True], ids=["no D", "D"])
def test_optional_inputs_may_be_absent(skip: bool, state: bool) -> None:
    inputs = ssd_inputs((2, 1, 1, 2), seq_len=CHUNK + 3, skip=skip, state=state, dtype=torch.float32)
    check_scan(inputs)
    check_converter(inputs)
    y = ssd_scan(**inputs, backend="triton")
    assert torch.equal(y, scan(**inputs)[0])
    first = gradients(partial(ssd_scan, backend="triton"), inputs)
    assert worst_error(first, gradients(lambda **x: oracle_scan(**x)[0], in_double(inputs))) < 4 * fp32_bound(inputs)
    state_alone = gradients(lambda **x: scan(**x)[1], inputs)
    assert worst_error(state_alone, gradients(lambda **x: oracle_scan(**x)[1], in_double(inputs))) < 4 * fp32_bound(
        inputs
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_term_is_rounded_a_few_times(dtype: torch.dtype) -> None:
    """Of y: the written value, the state or score, the output. Of gradients: those of two states and of a part too."""
    inputs = ssd_inputs(GROUPED, batch=1, seq_len=2 * CHUNK + 5, dtype=dtype, state_size=16, head_dim=16)
    inputs |= {name: inputs[name].float() for name in ("dt", "A", "D", "initial_state")}
    y, state = scan(**inputs)
    exact_y, exact_state = oracle_scan(**in_double(inputs))
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert relative_rms_error(y, exact_y) < scan_bound(inputs, dtype, 3)
    assert relative_rms_error(state, exact_state) < scan_bound(inputs, dtype, 1)
    exact = gradients(oracle_scan, in_double(inputs))
    for name, found, wanted in zip(gradient_names(inputs), gradients(scan, inputs), exact, strict=True):
        assert found.dtype == inputs[name].dtype
        error = rate_error(found, inputs) if name == "A" else relative_rms_error(found, wanted)
        assert error < scan_bound(inputs, dtype, 5), name


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bounds_would_show_a_wrong_recurrence(fault: str) -> None:
    inputs = ssd_inputs((4, 2, 2, 4), batch=1, seq_len=2 * CHUNK + 5)
    loosest = scan_bound(inputs, torch.bfloat16, 5)
    wrong = partial(oracle_scan, fault=fault)
    assert relative_rms_error(wrong(**inputs)[0], oracle_scan(**inputs)[0]) > FAULT_FACTOR * loosest
    assert worst_error(gradients(wrong, inputs), gradients(oracle_scan, inputs)) > FAULT_FACTOR * loosest


@pytest.mark.parametrize("changes", [{"sweeps": None}, {"forward_sweeps": True}], ids=["stored states", "sweeps"])
@pytest.mark.parametrize("programs", [1, 10**6], ids=["whole rows", "cut rows"])
@pytest.mark.parametrize("borders", [None, UNEVEN], ids=["dense", "uneven"])
def test_the_other_way_is_as_good(borders: list[int] | None, programs: int, changes: dict[str, Any]) -> None:
    shape = {"batch": 1, "seq_len": borders[-1], "rows": len(borders) - 1} if borders else {"seq_len": 5 * CHUNK + 1}
    with launches().configured(programs=programs, **changes):
        check_scan(ssd_inputs((4, 1, 2, 2), **shape, dtype=torch.float32), borders)


@pytest.mark.parametrize("part", ["decays", "states", "flows", "sums", "gradients of states"])
def test_a_sweep_that_went_wrong_would_be_seen(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Each is off by a hundredth in what one launch hands to the next."""
    module = launches()
    inputs = ssd_inputs((2, 1, 1, 2), batch=1, seq_len=6 * CHUNK + 5, dtype=torch.float32)
    decays, sweep, recur = module._decays, module._sweep, module._recur

    def wrong_decays(*args: Any) -> Tensor:
        total, step = decays(*args)
        return torch.stack([1.01 * total, step])

    def wrong_sweep(*args: Any, **options: Any) -> None:
        sweep(*args, **options)
        if options.get(part) is not None:
            options[part].mul_(1.01)

    def wrong_recur(*args: Any, reverse: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
        entering, ends = recur(*args, reverse=reverse, **options)
        return entering * (1.01 if reverse else 1), ends

    if part == "decays":
        monkeypatch.setattr(module, "_decays", wrong_decays)
    elif part == "gradients of states":
        monkeypatch.setattr(module, "_recur", wrong_recur)
    else:
        monkeypatch.setattr(module, "_sweep", wrong_sweep)
    with module.configured(programs=10**6):
        found = gradients(scan, inputs)
    exact = gradients(oracle_scan, in_double(inputs))
    assert worst_error(found, exact) > FAULT_FACTOR * 4 * fp32_bound(inputs, chunk=32)


@pytest.mark.parametrize("part", ["decays", "states that enter", "gradients of states"])
def test_a_kernel_that_went_wrong_would_be_seen(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Each is off by a hundredth in what one launch hands to the next."""
    module = launches()
    inputs = ssd_inputs((2, 1, 1, 2), batch=1, seq_len=2 * CHUNK + 5, dtype=torch.float32)
    decays, carry = module._decays, module._carry

    def wrong_decays(*args: Any) -> Tensor:
        total, step = decays(*args)
        return torch.stack([1.01 * total, step])

    def wrong_carry(*args: Any, reverse: bool = False, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        states, left, log_decay = carry(*args, reverse=reverse, **options)
        return states * (1.01 if reverse == (part == "gradients of states") else 1), left, log_decay

    if part == "decays":
        monkeypatch.setattr(module, "_decays", wrong_decays)
    else:
        monkeypatch.setattr(module, "_carry", wrong_carry)
    with module.configured(sweeps=None):
        found = gradients(scan, inputs)
    exact = gradients(oracle_scan, in_double(inputs))
    assert worst_error(found, exact) > FAULT_FACTOR * 4 * fp32_bound(inputs, chunk=32)


def test_views_of_one_projection_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, n, cut = (4, 2, 2), 16, 5
    qkv = torch.randn(2, CHUNK + 9, sum(heads) * n, device=DEVICE)
    fused = [x.unflatten(-1, (-1, n)) for x in qkv.split([count * n for count in heads], dim=-1)]
    inputs = ssd_inputs(GROUPED, seq_len=CHUNK + 9, state_size=n, head_dim=n, dtype=torch.float32)
    inputs |= dict(zip(("q", "k", "v"), fused, strict=True))
    inputs |= {name: inputs[name][:, cut:] for name in ("q", "k", "v", "dt")}
    exact = oracle_scan(**in_double(inputs))
    copied = []
    readable = launches()._readable

    def spy(x: Tensor) -> Tensor:
        found = readable(x)
        copied.append(found.data_ptr() != x.data_ptr())
        return found

    monkeypatch.setattr(launches(), "_readable", spy)
    y, state = scan(**inputs)
    assert copied == [False, False, False]
    assert worst_error((y, state), exact) < fp32_bound(inputs)


def test_any_strides_are_understood() -> None:
    inputs = ssd_inputs(GROUPED, seq_len=CHUNK + 3, dtype=torch.float32)
    names = ("q", "k", "v", "dt", "initial_state")
    strided = {name: inputs[name].transpose(1, -1).contiguous().transpose(1, -1) for name in names}
    assert worst_error(scan(**(inputs | strided)), oracle_scan(**in_double(inputs))) < fp32_bound(inputs)
    expanded = inputs | {"dt": inputs["dt"][..., :1].expand(-1, -1, 4)}
    assert worst_error(scan(**expanded), oracle_scan(**in_double(expanded))) < fp32_bound(expanded)


def test_gradients_of_any_strides_are_understood() -> None:
    inputs = ssd_inputs(GROUPED, seq_len=CHUNK + 3, dtype=torch.float32)

    def summed(implementation: Any, **values: Tensor) -> Tensor:
        return implementation(**values)[0].sum()  # its gradient is one number, of no strides

    exact = gradients(partial(summed, oracle_scan), in_double(inputs))
    assert worst_error(gradients(partial(summed, scan), inputs), exact) < 4 * fp32_bound(inputs)


def test_the_same_bits_every_time() -> None:
    inputs = ssd_inputs(GROUPED, seq_len=2 * CHUNK + 5, dtype=torch.float32)
    runs = [(*scan(**inputs), *gradients(scan, inputs)) for _ in range(5 if DEVICE.type == "cuda" else 2)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("borders", [None, [0, 0, 3, 20]], ids=["dense", "packed"])
def test_torch_knows_the_ops(borders: list[int] | None) -> None:
    from transmamba.ops.ssd_scan.triton import memory_converter_op, ssd_scan_op

    shape = {"batch": 1, "rows": 3} if borders else {"batch": 2}
    inputs = ssd_inputs((2, 1, 1, 2), **shape, seq_len=20, dtype=torch.float32, requires_grad=True)
    q, k, v, dt, A, D, state = inputs.values()
    before = torch.randn(shape["batch"], 3, 2, 5, device=DEVICE, requires_grad=True)
    torch.library.opcheck(ssd_scan_op, (q, k, v, dt, A, D, state, before, borders))
    torch.library.opcheck(ssd_scan_op, (q, k, v, dt, A, None, None, None, borders))
    torch.library.opcheck(memory_converter_op, (k, v, dt, A, state, borders))


@pytest.mark.parametrize("borders", [None, UNEVEN], ids=["dense", "packed"])
@pytest.mark.parametrize("trans_point", [0, 1, CHUNK + 1, 10**6, None])
def test_the_hybrid_is_attention_and_then_the_state_space(trans_point: int | None, borders: list[int] | None) -> None:
    shape = {"batch": 1, "seq_len": borders[-1]} if borders else {"seq_len": 2 * CHUNK + 3}
    inputs = without(ssd_inputs(GROUPED, **shape, dtype=torch.float32), "initial_state")
    angles = torch.randn(shape["seq_len"], 6, dtype=torch.float64, device=DEVICE)[:, [0, 1, 2, 0, 1, 2]]
    options = {"trans_point": trans_point, "cu_seqlens": borders}
    single, double = ((angles.cos().to(dtype), angles.sin().to(dtype)) for dtype in (torch.float32, torch.float64))
    mix = partial(hybrid_mixer, **options, backend="triton", rotary=single)
    exact = partial(oracle_hybrid, **options, rotary=double)
    bound = fp32_bound(inputs, chunk=32) + 4 * rounding(torch.float32) * 6**0.5  # the rotation's table is rounded too
    assert relative_rms_error(mix(**inputs), exact(**in_double(inputs))) < bound
    assert worst_error(gradients(mix, inputs), gradients(exact, in_double(inputs))) < 4 * bound


def test_the_hybrid_hands_its_state_over() -> None:
    inputs = without(ssd_inputs(GROUPED, seq_len=CHUNK + 5, dtype=torch.float32), "initial_state")
    for trans_point in (0, 7, None):
        state = hybrid_mixer(**inputs, trans_point=trans_point, return_final_state=True, backend="triton")[1]
        assert relative_rms_error(state, oracle_scan(**in_double(inputs))[1]) < fp32_bound(inputs)


def test_a_sequence_cut_anywhere_equals_the_whole() -> None:
    inputs = ssd_inputs((2, 1, 1, 2), seq_len=3 * CHUNK, dtype=torch.float32)
    cuts = [0, 5, CHUNK + 7, 3 * CHUNK]
    state, outputs = inputs["initial_state"], []
    for start, end in pairwise(cuts):
        part = {name: inputs[name][:, start:end] for name in ("q", "k", "v", "dt")}
        y, state = scan(**(inputs | part | {"initial_state": state}))
        outputs.append(y)
    assert worst_error((torch.cat(outputs, dim=1), state), oracle_scan(**in_double(inputs))) < 3 * fp32_bound(inputs)


def test_fp64_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match="the inputs are float64; pass backend='torch', or None"):
        ssd_scan(**ssd_inputs(), backend="triton")
