"""hybrid_mixer against the oracle: where(position < TransPoint, attention, SSM), and every fault shown."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import DEVICE, relative_rms_error
from tests.ops.cases import (
    BORDERS,
    CHUNK,
    FAULT_FACTOR,
    FP64_BOUND,
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
from tests.ops.oracle import ATTENTION_FAULTS, FAULTS, HAND_OVER_FAULTS, oracle_hybrid, oracle_scan
from transmamba.ops import hybrid_mixer, memory_converter, softmax_attention, ssd_scan
from transmamba.ops.hybrid_mixer import hybrid_mixer_reference, hybrid_mixer_torch

BACKENDS = ("reference", "torch")
SEQ_LEN = 2 * CHUNK + 9
TRANS_POINTS = (0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 1, None)


def mixer_inputs(heads: tuple[int, int, int, int] = (4, 4, 4, 4), **shape: Any) -> Inputs:
    return without(ssd_inputs(heads, **({"seq_len": SEQ_LEN} | shape)), "initial_state")


def rotary_tables(seq_len: int, state_size: int = 6, *, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin for positions that count from 0; with a batch, every row starts elsewhere."""
    start = torch.zeros(1) if batch is None else 3.0 * torch.arange(batch)
    position = start[:, None] + torch.arange(seq_len)
    angle = position[..., None] * 10.0 ** -torch.arange(state_size // 2)
    angle = torch.cat([angle, angle], dim=-1).to(DEVICE, torch.float64)
    return (angle.cos()[0], angle.sin()[0]) if batch is None else (angle.cos(), angle.sin())


def shape_of(borders: list[int] | None) -> dict[str, int]:
    return {} if borders is None else {"batch": 1, "seq_len": borders[-1]}


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("borders", [None, BORDERS["uneven"]], ids=["dense", "packed"])
@pytest.mark.parametrize("trans_point", TRANS_POINTS)
def test_it_is_the_oracle_in_values_and_gradients(
    trans_point: int | None, borders: list[int] | None, rotated: bool
) -> None:
    inputs = mixer_inputs((8, 2, 2, 8), **shape_of(borders))
    options = {
        "trans_point": trans_point,
        "cu_seqlens": borders,
        "rotary": rotary_tables(inputs["q"].shape[1]) if rotated else None,
    }
    y = hybrid_mixer(**inputs, **options)
    assert relative_rms_error(y, oracle_hybrid(**inputs, **options)) < FP64_BOUND
    exact = gradients(oracle_hybrid, inputs, **options)
    assert worst_error(gradients(hybrid_mixer, inputs, **options), exact) < FP64_BOUND


@pytest.mark.parametrize("borders", [None, [0, 0, 1, CHUNK + 6, CHUNK + 9]], ids=["dense", "packed"])
@pytest.mark.parametrize("trans_point", [0, 1, 5, CHUNK + 6, None])
def test_the_reference_is_the_oracle_in_values_and_gradients(
    trans_point: int | None, borders: list[int] | None
) -> None:
    inputs = mixer_inputs((8, 2, 2, 8), **({"seq_len": CHUNK + 9} | shape_of(borders)))
    options = {"trans_point": trans_point, "cu_seqlens": borders, "rotary": rotary_tables(CHUNK + 9)}
    reference = partial(hybrid_mixer, backend="reference")
    assert relative_rms_error(reference(**inputs, **options), oracle_hybrid(**inputs, **options)) < FP64_BOUND
    exact = gradients(oracle_hybrid, inputs, **options)
    assert worst_error(gradients(reference, inputs, **options), exact) < FP64_BOUND


@pytest.mark.parametrize("skip", [False, True], ids=["no D", "D"])
@pytest.mark.parametrize("trans_point", [0, 5, None])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_head_count_gives_the_oracle(
    heads: tuple[int, int, int, int], trans_point: int | None, skip: bool
) -> None:
    inputs = mixer_inputs(heads, seq_len=CHUNK + 7, skip=skip)
    options = {"trans_point": trans_point, "rotary": rotary_tables(CHUNK + 7, batch=2)}
    exact = oracle_hybrid(**inputs, **options)
    for backend in BACKENDS:
        assert relative_rms_error(hybrid_mixer(**inputs, **options, backend=backend), exact) < FP64_BOUND


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("trans_point", [0, 1, 4, CHUNK, None])
def test_the_trans_point_counts_within_the_document(trans_point: int | None, borders: list[int]) -> None:
    inputs = mixer_inputs((8, 2, 2, 8), **shape_of(borders))
    y, state = hybrid_mixer(**inputs, trans_point=trans_point, cu_seqlens=borders, return_final_state=True)
    for i, (start, end) in enumerate(pairwise(borders)):
        document = inputs | {name: inputs[name][:, start:end] for name in ("q", "k", "v", "dt")}
        alone, final_state = hybrid_mixer(**document, trans_point=trans_point, return_final_state=True)
        assert relative_rms_error(y[:, start:end], alone) < FP64_BOUND
        assert relative_rms_error(state[i : i + 1], final_state) < FP64_BOUND


@pytest.mark.parametrize("seq_len", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("trans_point", [0, 1, 2, None])
def test_tiny_rows_give_the_oracle(trans_point: int | None, batch: int, seq_len: int) -> None:
    inputs = mixer_inputs((8, 2, 2, 8), batch=batch, seq_len=seq_len)
    for backend in BACKENDS:
        y, state = hybrid_mixer(**inputs, trans_point=trans_point, return_final_state=True, backend=backend)
        assert relative_rms_error(y, oracle_hybrid(**inputs, trans_point=trans_point)) < FP64_BOUND
        assert relative_rms_error(state, oracle_scan(**inputs)[1]) < FP64_BOUND


@pytest.mark.parametrize("trans_point", [0, SEQ_LEN, None])
def test_the_two_ends_are_the_pure_modes(trans_point: int | None) -> None:
    inputs = mixer_inputs()
    pure = ssd_scan(**inputs) if trans_point == 0 else softmax_attention(inputs["q"], inputs["k"], inputs["v"])
    assert torch.equal(hybrid_mixer(**inputs, trans_point=trans_point), pure)


@pytest.mark.parametrize("borders", [None, BORDERS["uneven"]], ids=["dense", "packed"])
@pytest.mark.parametrize("trans_point", TRANS_POINTS)
def test_the_final_state_is_the_recurrence_whichever_mode_ended(
    trans_point: int | None, borders: list[int] | None
) -> None:
    inputs = mixer_inputs((8, 2, 2, 8), **shape_of(borders))
    for backend in BACKENDS if trans_point == 2 else ("torch",):
        _, state = hybrid_mixer(
            **inputs, trans_point=trans_point, cu_seqlens=borders, return_final_state=True, backend=backend
        )
        assert relative_rms_error(state, oracle_scan(**inputs, cu_seqlens=borders)[1]) < FP64_BOUND


@pytest.mark.parametrize("token", [0, CHUNK - 1, CHUNK, CHUNK + 4, SEQ_LEN - 1])
@pytest.mark.parametrize("trans_point", [1, CHUNK, CHUNK + 4, None])
def test_no_output_sees_the_future(trans_point: int | None, token: int) -> None:
    inputs = mixer_inputs()
    changed = {name: x if x.dim() == 1 else x.clone() for name, x in inputs.items()}
    for name in ("q", "k", "v", "dt"):
        changed[name][:, token] += 1
    y, y_changed = (hybrid_mixer(**x, trans_point=trans_point) for x in (inputs, changed))
    assert torch.equal(y[:, :token], y_changed[:, :token])
    assert not torch.equal(y[:, token], y_changed[:, token])


def test_the_suffix_sees_the_prefix_through_the_state_alone() -> None:
    inputs, trans_point = mixer_inputs(seq_len=SEQ_LEN), CHUNK + 3
    prefix, suffix = slice(None, trans_point), slice(trans_point, None)
    k, v, dt = (inputs[name][:, prefix] for name in ("k", "v", "dt"))
    after = inputs | {name: inputs[name][:, suffix] for name in ("q", "k", "v", "dt")}
    expected = ssd_scan(**after, initial_state=memory_converter(k, v, dt, inputs["A"]))
    assert relative_rms_error(hybrid_mixer(**inputs, trans_point=trans_point)[:, suffix], expected) < FP64_BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_on_the_suffix_reaches_the_prefix(backend: str) -> None:
    trans_point = 9
    inputs = mixer_inputs(seq_len=CHUNK, requires_grad=True)
    rotary = rotary_tables(CHUNK)
    hybrid_mixer(**inputs, trans_point=trans_point, rotary=rotary, backend=backend)[:, trans_point:].sum().backward()
    grads = {name: x.grad for name, x in inputs.items()}
    for x in inputs.values():
        x.grad = None
    oracle_hybrid(**inputs, trans_point=trans_point, rotary=rotary)[:, trans_point:].sum().backward()
    for name in ("k", "v", "dt"):
        assert grads[name][:, :trans_point].abs().amin(dim=(0, 2)).min() > 0
        assert relative_rms_error(grads[name], inputs[name].grad) < FP64_BOUND
    assert not grads["q"][:, :trans_point].any()  # a prefix query writes nothing into the state


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("trans_point", [0, 2, None])
@pytest.mark.parametrize("implementation", [hybrid_mixer_reference, hybrid_mixer_torch], ids=BACKENDS)
def test_gradients_are_those_of_finite_differences(implementation: Any, trans_point: int | None, packed: bool) -> None:
    shape = {"batch": 1, "seq_len": 5, "state_size": 2, "head_dim": 2, "device": "cpu"}
    inputs = mixer_inputs((2, 1, 1, 2), **shape, requires_grad=True)
    rotary = tuple(x.cpu() for x in rotary_tables(5, 2))

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor]:
        return implementation(
            **dict(zip(inputs, values, strict=True)),
            trans_point=trans_point,
            rotary=rotary,
            cu_seqlens=[0, 4, 4, 5] if packed else None,
            return_final_state=True,
        )

    assert torch.autograd.gradcheck(outputs, tuple(inputs.values()))


@pytest.mark.parametrize("trans_point", [0, CHUNK + 3, None])
def test_fp32_errs_by_rounding_only(trans_point: int | None) -> None:
    inputs = mixer_inputs((8, 2, 2, 8), dtype=torch.float32)
    exact = oracle_hybrid(**in_double(inputs), trans_point=trans_point)
    assert relative_rms_error(hybrid_mixer(**inputs, trans_point=trans_point), exact) < fp32_bound(inputs)
    assert worst_error(
        gradients(hybrid_mixer, inputs, trans_point=trans_point),
        gradients(oracle_hybrid, in_double(inputs), trans_point=trans_point),
    ) < 4 * fp32_bound(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trans_point", [0, CHUNK + 3, None])
def test_sixteen_bits_round_the_output_once(trans_point: int | None, dtype: torch.dtype) -> None:
    inputs = mixer_inputs((8, 2, 2, 8), dtype=dtype)
    y, state = hybrid_mixer(**inputs, trans_point=trans_point, return_final_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    # Attention kernels may also round the weights: a second rounding.
    bound = 2 * rounding(dtype) + fp32_bound(inputs)
    assert relative_rms_error(y, oracle_hybrid(**in_double(inputs), trans_point=trans_point)) < bound


def fault_case(fault: str) -> tuple[Inputs, dict[str, Any]]:
    trans_point = CHUNK + 3
    inputs = mixer_inputs((2, 2, 6, 6))
    return inputs, {"trans_point": trans_point, "rotary": rotary_tables(SEQ_LEN), "fault": fault}


@pytest.mark.parametrize("fault", [*FAULTS, *ATTENTION_FAULTS, *HAND_OVER_FAULTS])
def test_every_fault_is_far_above_the_bounds(fault: str) -> None:
    inputs, options = fault_case(fault)
    right = {"fault": None}
    loosest = 2 * rounding(torch.bfloat16) + fp32_bound(inputs)
    exact, wrong = oracle_hybrid(**inputs, **(options | right)), oracle_hybrid(**inputs, **options)
    assert relative_rms_error(hybrid_mixer(**inputs, **without(options, "fault")), exact) < FP64_BOUND
    first = options["trans_point"]
    shown = slice(None)
    if fault in HAND_OVER_FAULTS:
        assert torch.equal(wrong[:, :first], exact[:, :first])
        shown = slice(first, first + 1)
    if fault in ATTENTION_FAULTS:
        assert torch.equal(wrong[:, first:], exact[:, first:])
        shown = slice(first)
    error = relative_rms_error(wrong[:, shown], exact[:, shown])
    assert error > FAULT_FACTOR * loosest
    exact_gradients = gradients(oracle_hybrid, inputs, **(options | right))
    wrong_gradients = gradients(oracle_hybrid, inputs, **options)
    assert worst_error(wrong_gradients, exact_gradients) > FAULT_FACTOR * 4 * fp32_bound(inputs)


@pytest.mark.parametrize(
    ("fault", "at_least"),
    [("converter without dt", 0.3), ("converter index shifted", 0.05), ("rotated keys in the state", 0.3)],
)
def test_the_first_token_after_the_switch_shows_a_wrong_hand_over(fault: str, at_least: float) -> None:
    inputs, options = fault_case(fault)
    first = options["trans_point"]
    y = hybrid_mixer(**inputs, **without(options, "fault"))
    assert relative_rms_error(oracle_hybrid(**inputs, **options)[:, first], y[:, first]) > at_least


def test_keys_and_queries_rotated_before_the_call_stay_exact() -> None:
    """In both modes: the state then holds rotated keys and meets rotated queries."""
    inputs, trans_point, rotary = mixer_inputs(), CHUNK + 3, rotary_tables(SEQ_LEN)
    angle = torch.complex(*(table[:, :3] for table in rotary))

    def turn(x: Tensor) -> Tensor:
        pairs = torch.complex(*x.chunk(2, dim=-1)) * angle[:, None]
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    turned = inputs | {"q": turn(inputs["q"]), "k": turn(inputs["k"])}
    y = hybrid_mixer(**turned, trans_point=trans_point)
    assert relative_rms_error(y, oracle_hybrid(**turned, trans_point=trans_point)) < FP64_BOUND
    inside = hybrid_mixer(**inputs, trans_point=trans_point, rotary=rotary)
    assert relative_rms_error(y[:, :trans_point], inside[:, :trans_point]) < FP64_BOUND


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_layout_gives_what_the_reference_gives(data: st.DataObject) -> None:
    packed = data.draw(st.booleans(), label="packed")
    lengths = data.draw(st.lists(st.integers(0, CHUNK + 2), min_size=1, max_size=5 if packed else 1))
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)] if packed else None
    inputs = mixer_inputs(
        data.draw(st.sampled_from(list(HEADS.values())), label="heads"),
        batch=1 if packed else data.draw(st.integers(0, 3), label="batch"),
        seq_len=sum(lengths),
        state_size=2 * data.draw(st.integers(1, 4), label="half the state size"),
        head_dim=data.draw(st.integers(1, 9), label="head dim"),
        skip=data.draw(st.booleans(), label="D"),
    )
    rotated = data.draw(st.booleans(), label="rotary")
    options = {
        "trans_point": data.draw(st.none() | st.integers(0, CHUNK + 4), label="trans point"),
        "rotary": rotary_tables(sum(lengths), inputs["q"].shape[-1]) if rotated else None,
        "cu_seqlens": borders,
        "return_final_state": True,
    }
    exact = hybrid_mixer(**inputs, **options, backend="reference")
    assert worst_error(hybrid_mixer(**inputs, **options), exact) < FP64_BOUND
