"""Bad input: every op refuses it before it computes, and says which value is wrong, of which op, and what to do."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.cases import Inputs, ssd_inputs, without
from transmamba.errors import InputError
from transmamba.ops import (
    causal_conv1d,
    check_values,
    hybrid_mixer,
    memory_converter,
    selective_scan,
    softmax_attention,
    ssd_scan,
    ssd_step,
)

Op = Callable[..., Any]


def scan_inputs(**shape: Any) -> Inputs:
    return ssd_inputs((4, 2, 2, 4), device=torch.device("cpu"), **shape)


def inputs_of(op: Op) -> Inputs:
    """Good inputs: heads 4, of which k and v have 2; batch 2; 7 tokens; state_size 6, head_dim 5."""
    inputs = scan_inputs()
    if op is ssd_step:
        token = {name: inputs[name][:, 0] for name in ("q", "k", "v", "dt")}
        return {"state": inputs["initial_state"], **token, "A": inputs["A"], "D": inputs["D"]}
    if op is memory_converter:
        return without(inputs, "q", "D")
    if op is hybrid_mixer:
        return {**without(inputs, "initial_state"), "trans_point": 3}
    if op is softmax_attention:
        return {name: inputs[name] for name in ("q", "k", "v")}
    if op is selective_scan:
        channels, states = torch.randn(2, 5, 7).double(), torch.randn(2, 6, 7).double()
        tokens = {"u": channels, "delta": channels, "B": states, "C": states, "z": channels}
        A = -torch.rand(5, 6).double()
        rest = {"A": A, "D": A[:, 0], "delta_bias": A[:, 1], "initial_state": channels[:, :, :6]}
        return tokens | rest | {"delta_softplus": True}
    if op is causal_conv1d:
        x, weight = torch.randn(2, 7, 5).double(), torch.randn(5, 4).double()
        return {"x": x, "weight": weight, "bias": weight[:, 0], "initial_state": x[:, :3]}
    return inputs


SSD_OPS: tuple[Op, ...] = (ssd_scan, ssd_step, memory_converter, hybrid_mixer)
OPS: tuple[Op, ...] = (*SSD_OPS, softmax_attention, causal_conv1d, selective_scan)


def name_of(value: object) -> str:
    if isinstance(value, tuple):
        return str(value[0])
    return value.__name__ if callable(value) else str(value)


def refused(op: Op, inputs: Inputs, *fragments: str) -> None:
    """Assert that op raises an InputError of one line, which names the op and holds the fragments."""
    with pytest.raises(InputError) as caught:
        op(**inputs)
    message = str(caught.value)
    assert op.__name__ in message
    assert "\n" not in message
    assert [fragment for fragment in fragments if fragment not in message] == [], message


@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_the_good_inputs_are_good(op: Op) -> None:
    op(**inputs_of(op))


def wrong_shapes() -> Iterator[tuple[Op, str, Callable[[Tensor], Tensor], tuple[str, ...]]]:
    """What is done to which input, and what the message says."""
    for op in SSD_OPS:
        yield op, "k", lambda k: k[0], ("k has shape", "(batch")
        yield op, "v", lambda v: v[0], ("v has shape", "head_dim)")
        yield op, "dt", lambda dt: dt[..., None], ("dt has shape", "after softplus")
        yield op, "A", lambda A: A[:, None], ("A has shape (4, 1)", "(4,)")
        yield op, "A", lambda A: A[:3], ("A has 3 heads and dt 4",)
        yield op, "v", lambda v: v[:1], ("leading shape differs", "v (1")
        yield op, "dt", lambda dt: dt[:1], ("leading shape differs", "dt (1")
        yield op, "k", lambda k: k.repeat_interleave(3, -2)[..., :3, :], ("k has 3 heads", "do not divide the 4 heads")
        yield op, "v", lambda v: v[..., :0, :], ("v has 0 heads", "make it a divisor")
    for op in (ssd_scan, ssd_step, hybrid_mixer):
        yield op, "q", lambda q: q[0], ("q has shape", "state_size)")
        yield op, "q", lambda q: q[..., :5], ("q has state_size 5 and k 6",)
        yield op, "q", lambda q: q[..., :3, :], ("q has 3 heads", "do not divide the 4 heads of the output")
        yield op, "q", lambda q: q.repeat(*[1] * (q.dim() - 2), 3, 1)[..., :6, :], ("dt has 4 heads", "the 6 heads")
        yield op, "D", lambda D: D[:3], ("D has shape (3,)", "(4,)", "or None")
    for op, name in ((ssd_scan, "initial_state"), (memory_converter, "initial_state"), (ssd_step, "state")):
        yield op, name, lambda state: state[:, :2], ("(2, 2, 6, 5)", "(2, 4, 6, 5)", "state_heads")
        yield op, name, lambda state: state.transpose(-1, -2), ("(2, 4, 5, 6)", "(2, 4, 6, 5)")
        yield op, name, lambda state: state[:1], ("(1, 4, 6, 5)", "(2, 4, 6, 5)")
    yield softmax_attention, "q", lambda q: q[0], ("(batch, seq_len, heads, dim)",)
    yield softmax_attention, "q", lambda q: q[:1], ("do not belong together", "(1, 7, 4, 6)")
    yield softmax_attention, "q", lambda q: q[..., :5], ("do not belong together",)
    yield softmax_attention, "v", lambda v: v[:, :6], ("do not belong together",)
    yield softmax_attention, "q", lambda q: q.repeat(1, 2, 1, 1), ("14 queries but only 7 keys",)
    yield softmax_attention, "q", lambda q: q[:, :, :3], ("k has 2 heads", "the 3 heads")
    yield causal_conv1d, "x", lambda x: x[0], ("x has shape (7, 5)", "(batch, seq_len, channels)")
    yield causal_conv1d, "weight", lambda w: w[:, :, None], ("weight (5, 4, 1)", "(channels, kernel)")
    yield causal_conv1d, "weight", lambda w: w[:4], ("weight (4, 4)",)
    yield causal_conv1d, "weight", lambda w: w[:, :0], ("weight (5, 0)",)
    yield causal_conv1d, "bias", lambda b: b[:4], ("bias has shape (4,)", "(5,)", "or None")
    yield causal_conv1d, "initial_state", lambda s: s[:, :2], ("(2, 2, 5)", "(2, 3, 5)", "kernel - 1")


@pytest.mark.parametrize(("op", "name", "change", "fragments"), list(wrong_shapes()), ids=name_of)
def test_a_wrong_shape_is_named(op: Op, name: str, change: Callable[[Tensor], Tensor], fragments: tuple) -> None:
    inputs = inputs_of(op)
    refused(op, inputs | {name: change(inputs[name])}, *fragments)
    refused(op, inputs | {name: change(inputs[name]), "validate": False}, *fragments)


def test_state_heads_must_be_divided() -> None:
    inputs = ssd_inputs((12, 4, 6, 6), state=False)
    refused(ssd_scan, inputs, "k has 4 heads", "do not divide the 6 heads of the state")


def floating(op: Op) -> list[str]:
    return [name for name, x in inputs_of(op).items() if isinstance(x, Tensor)]


EVERY_INPUT = [(op, name) for op in OPS for name in floating(op)]


def as_named(name: str) -> str:
    return "state" if name == "initial_state" else name


@pytest.mark.parametrize(("op", "name"), EVERY_INPUT, ids=name_of)
def test_integers_are_refused(op: Op, name: str) -> None:
    inputs = inputs_of(op)
    refused(op, inputs | {name: inputs[name].long()}, as_named(name), "torch.int64", "torch.float32")


@pytest.mark.parametrize(("op", "name"), EVERY_INPUT, ids=name_of)
def test_one_device_is_asked_for(op: Op, name: str) -> None:
    inputs = inputs_of(op)
    refused(op, inputs | {name: inputs[name].to("meta")}, "device differs", f"{as_named(name)} meta", "one device")


@pytest.mark.parametrize("op", [*SSD_OPS, softmax_attention], ids=name_of)
def test_keys_and_values_share_a_dtype(op: Op) -> None:
    inputs = inputs_of(op)
    refused(op, inputs | {"v": inputs["v"].bfloat16()}, "dtype differs", "k torch.float64", "v torch.bfloat16")


@pytest.mark.parametrize("op", SSD_OPS, ids=name_of)
def test_steps_and_rates_may_be_wider(op: Op) -> None:
    inputs = inputs_of(op)
    narrow = {name: inputs[name].bfloat16() for name in ("q", "k", "v") if name in inputs}
    op(**(inputs | narrow))


@pytest.mark.parametrize(("op", "name"), EVERY_INPUT, ids=name_of)
def test_nan_is_reported_with_its_place(op: Op, name: str) -> None:
    inputs = inputs_of(op)
    bad = inputs[name].clone()
    bad.view(-1)[-2] = math.nan
    place = tuple(torch.isnan(bad).nonzero()[0].tolist())
    fragments = f"{as_named(name)} holds NaN at 1 of {bad.numel()} places, the first at {place}", "upstream"
    refused(op, inputs | {name: bad}, *fragments)
    op(**(inputs | {name: bad, "validate": False}))


@pytest.mark.parametrize("op", SSD_OPS, ids=name_of)
@pytest.mark.parametrize(
    ("name", "value", "fragments"),
    [
        ("A", 0.0, ("A holds 0;", "must be < 0", "-exp(A_log)")),
        ("A", 0.25, ("A holds 0.25;", "must be < 0")),
        ("A", math.inf, ("A holds inf;", "must be < 0")),
        ("dt", -0.5, ("dt holds -0.5;", "must be >= 0", "softplus")),
    ],
)
def test_rates_and_steps_out_of_range_are_refused(op: Op, name: str, value: float, fragments: tuple[str, ...]) -> None:
    inputs = inputs_of(op)
    bad = inputs[name].clone()
    bad.view(-1)[1] = value
    refused(op, inputs | {name: bad}, *fragments)
    op(**(inputs | {name: bad, "validate": False}))


def test_infinities_pass_and_show_in_the_output() -> None:
    inputs = scan_inputs()
    inputs["v"][0, 3, 0, 0] = math.inf
    assert not torch.isfinite(ssd_scan(**inputs)).all()


def test_opposite_infinities_are_no_nan() -> None:
    inputs = scan_inputs()
    inputs["v"][0, 3, 0, 0], inputs["v"][0, 3, 0, 1] = math.inf, -math.inf
    ssd_scan(**inputs)


@pytest.fixture
def restored_policy() -> Iterator[None]:
    yield
    check_values(None)


@pytest.mark.usefixtures("restored_policy")
@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_the_policy_turns_the_reading_of_values_off_and_on(op: Op) -> None:
    inputs = inputs_of(op)
    name = {causal_conv1d: "x", selective_scan: "u"}.get(op, "v")
    bad = inputs | {name: torch.full_like(inputs[name], math.nan)}
    check_values(False)
    op(**bad)
    refused(op, inputs | {name: inputs[name].long()}, "torch.int64")
    check_values(True)
    refused(op, bad, "holds NaN")
    op(**bad, validate=False)
    check_values(None)
    refused(op, bad, "holds NaN")


@pytest.mark.usefixtures("restored_policy")
@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_shapes_alone_can_be_computed(op: Op) -> None:
    check_values(True)
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in inputs_of(op).items()}
    out = op(**inputs)
    assert (out if isinstance(out, Tensor) else out[0]).device.type == "meta"


PACKED_OPS = [op for op in OPS if op not in (ssd_step, selective_scan)]


def packed_inputs_of(op: Op) -> Inputs:
    inputs = inputs_of(op)
    one_row = {name: x[:1] for name, x in inputs.items() if isinstance(x, Tensor) and x.dim() >= 3}
    if op is causal_conv1d:
        one_row["weight"] = inputs["weight"]
    return without(inputs | one_row, "initial_state")


@pytest.mark.parametrize("op", PACKED_OPS, ids=name_of)
@pytest.mark.parametrize(
    ("borders", "fragments"),
    [
        ([], ("cu_seqlens is []", "start at 0")),
        ([0], ("cu_seqlens is [0]", "end at seq_len = 7")),
        ([1, 7], ("cu_seqlens is [1, 7]", "start at 0")),
        ([0, 3], ("cu_seqlens is [0, 3]", "end at seq_len = 7")),
        ([0, 8], ("cu_seqlens is [0, 8]", "end at seq_len = 7")),
        ([0, 5, 3, 7], ("cu_seqlens is [0, 5, 3, 7]", "never fall")),
        ([0, 1, 2, 3, 4, 5, 6, 5, 6, 7], ("cu_seqlens is [0, 1, 2, 3, ..., 5, 6, 7]", "never fall")),
        ([0, 2.5, 7], ("cu_seqlens is [0, 2.5, 7]", "whole numbers")),
        ([False, 7], ("cu_seqlens is [False, 7]", "whole numbers")),
        (torch.tensor([0.0, 7.0]), ("cu_seqlens is [0.0, 7.0]", "whole numbers")),
        (torch.tensor([[0, 7]]), ("cu_seqlens is [[0, 7]]", "whole numbers")),
    ],
    ids=str,
)
def test_borders_must_rise_from_zero_to_the_end(op: Op, borders: Any, fragments: tuple[str, ...]) -> None:
    refused(op, packed_inputs_of(op) | {"cu_seqlens": borders}, *fragments)


@pytest.mark.parametrize("op", PACKED_OPS, ids=name_of)
def test_a_packed_row_is_alone_in_its_batch(op: Op) -> None:
    inputs = without(inputs_of(op), "initial_state")
    refused(op, inputs | {"cu_seqlens": [0, 7]}, "the batch is 2", "flatten it to (1, batch * seq_len)")


@pytest.mark.parametrize("op", [ssd_scan, memory_converter, causal_conv1d], ids=name_of)
def test_a_packed_row_has_a_state_per_document(op: Op) -> None:
    state = inputs_of(op)["initial_state"]
    wanted = str((3, *state.shape[1:]))
    refused(
        op, packed_inputs_of(op) | {"cu_seqlens": [0, 2, 2, 7], "initial_state": state}, str(tuple(state.shape)), wanted
    )


@pytest.mark.parametrize("trans_point", [-1, 2.0, 0.5, True, "3", torch.tensor(3)], ids=str)
def test_a_trans_point_is_a_whole_number_or_none(trans_point: Any) -> None:
    inputs = inputs_of(hybrid_mixer) | {"trans_point": trans_point}
    refused(hybrid_mixer, inputs, f"trans_point is {trans_point!r}", ">= 0", "None to never switch")


@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_an_unknown_backend_is_refused_with_the_known_ones(op: Op) -> None:
    refused(op, inputs_of(op) | {"backend": "cuda"}, "'cuda'", "'reference' or 'torch'", "or None")


def test_an_unknown_activation_is_refused() -> None:
    refused(causal_conv1d, inputs_of(causal_conv1d) | {"activation": "relu"}, "'relu'", "'silu' or None")


@pytest.mark.parametrize(
    ("cos", "sin", "fragments"),
    [
        ((6, 6), (7, 6), ("cos has shape (6, 6)", "(7, 6)")),
        ((7, 6), (7, 3), ("sin has shape (7, 3)", "(7, 6)")),
        ((3, 7, 6), (3, 7, 6), ("cos has shape (3, 7, 6)", "leading batch")),
        ((6,), (6,), ("cos has shape (6,)",)),
    ],
)
def test_rotary_tables_must_fit(cos: tuple[int, ...], sin: tuple[int, ...], fragments: tuple[str, ...]) -> None:
    rotary = (torch.ones(cos).double(), torch.zeros(sin).double())
    refused(hybrid_mixer, inputs_of(hybrid_mixer) | {"rotary": rotary}, "rotary", *fragments)


def test_rotary_tables_are_two_floating_tensors_on_the_same_device() -> None:
    inputs, table = inputs_of(hybrid_mixer), torch.ones(7, 6).double()
    refused(hybrid_mixer, inputs | {"rotary": (table,)}, "rotary has 1 entries", "(cos, sin)")
    refused(hybrid_mixer, inputs | {"rotary": (table, table.long())}, "sin has dtype torch.int64")
    refused(hybrid_mixer, inputs | {"rotary": (table, table.to("meta"))}, "device differs", "sin meta")


def test_rotary_embedding_needs_pairs() -> None:
    inputs = without(ssd_inputs(state_size=3, device=torch.device("cpu")), "initial_state")
    tables = (torch.ones(7, 3), torch.zeros(7, 3))
    refused(hybrid_mixer, inputs | {"trans_point": 2, "rotary": tables}, "even state_size", "it is 3", "rotary=None")


@pytest.mark.parametrize(
    ("lengths", "fragments"),
    [
        ({"query_lengths": [3]}, ("1 query_lengths and 2 key_lengths", "give 2")),
        ({"key_lengths": [7, 7, 7]}, ("2 query_lengths and 3 key_lengths", "give 2")),
        ({"key_lengths": [7, 6]}, ("row 1 has 7 queries and 6 keys", "0 <= queries <= keys")),
        ({"query_lengths": [-1, 7]}, ("row 0 has -1 queries and 7 keys",)),
        ({"query_lengths": [1, 1], "key_lengths": [8, 7]}, ("row 0 has 1 queries and 8 keys", "7 keys")),
    ],
    ids=str,
)
def test_lengths_must_fit_their_rows(lengths: dict[str, list[int]], fragments: tuple[str, ...]) -> None:
    refused(softmax_attention, inputs_of(softmax_attention) | lengths, *fragments)


@pytest.mark.parametrize("extra", [{"key_lengths": [7]}, {"query_lengths": [7]}, {"queries": 6}], ids=str)
def test_packed_attention_takes_no_lengths_and_no_past(extra: dict[str, Any]) -> None:
    inputs = packed_inputs_of(softmax_attention)
    queries = extra.get("queries", 7)
    given = inputs | {"q": inputs["q"][:, :queries], "cu_seqlens": [0, queries]} | without(extra, "queries")
    refused(softmax_attention, given, "packed documents", "pass no lengths")
