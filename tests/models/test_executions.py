"""One meaning, many executions: however a document is run, its logits and gradients are those of the document alone."""

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE, relative_rms_error
from tests.models.language_models import (
    TRANS_POINT,
    VARIANTS,
    documents,
    shared_model,
    tiny_model,
    tokens,
    worst_error,
)
from transmamba import TransMambaForCausalLM
from transmamba.modules import TransMambaLayerCache

Model = TransMambaForCausalLM
Execution = Callable[[Model, list[Tensor]], list[Tensor]]

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}

# Lengths on every side of the TransPoint: rows of one batch are then in different modes.
LENGTHS = (19, TRANS_POINT - 1, TRANS_POINT, TRANS_POINT + 1, 1, 2, 12)
# Long enough for three chunks of ssd_scan (at most 64 tokens each), with borders on and beside those of the chunks.
LONG_SCHEDULES = ([0, 5, 64], [63, 65, None], [1, 128, 130])
LONG_LENGTHS = (150, 64, 131)


def alone(model: Model, docs: list[Tensor]) -> list[Tensor]:
    return [model(doc[None], use_cache=False).logits[0] for doc in docs]


def with_cache(model: Model, docs: list[Tensor]) -> list[Tensor]:
    return [model(doc[None], use_cache=True).logits[0] for doc in docs]


def packed_by_position_ids(model: Model, docs: list[Tensor]) -> list[Tensor]:
    logits = model(torch.cat(docs)[None], position_ids=positions(docs)[None]).logits[0]
    return list(logits.split([len(doc) for doc in docs]))


def packed_by_cu_seqlens(model: Model, docs: list[Tensor]) -> list[Tensor]:
    lengths = [len(doc) for doc in docs]
    borders = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)
    return list(model(torch.cat(docs)[None], cu_seqlens=borders).logits[0].split(lengths))


def packed_and_right_padded(model: Model, docs: list[Tensor]) -> list[Tensor]:
    """Two rows of several documents each, the second shorter."""
    half = len(docs) // 2
    halves = [docs[:half], docs[half:]]
    ids, mask = padded([torch.cat(part) for part in halves], "right")
    places, _ = padded([positions(part) for part in halves], "right")
    logits = model(ids, attention_mask=mask, position_ids=places).logits
    return [
        piece
        for row, part in enumerate(halves)
        for piece in logits[row, : sum(map(len, part))].split([len(doc) for doc in part])
    ]


def padded_batch(model: Model, docs: list[Tensor], *, side: str) -> list[Tensor]:
    ids, mask = padded(docs, side)
    return unpadded(model(ids, attention_mask=mask, use_cache=False).logits, mask)


def padded_batch_in_chunks(model: Model, docs: list[Tensor], *, side: str, sizes: Sequence[int]) -> list[Tensor]:
    ids, mask = padded(docs, side)
    cache, logits = model.make_cache(), []
    for start, end in cuts(ids.shape[1], sizes):
        logits.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    return unpadded(torch.cat(logits, dim=1), mask)


def chunks(model: Model, docs: list[Tensor], *, sizes: Sequence[int]) -> list[Tensor]:
    """Each document alone onto a live cache, in chunks of the given sizes, the last repeated."""
    outputs = []
    for doc in docs:
        cache = model.make_cache()
        pieces = [model(doc[None, a:b], past_key_values=cache).logits[0] for a, b in cuts(len(doc), sizes)]
        outputs.append(torch.cat(pieces))
    return outputs


def rows_that_go_on_unevenly(model: Model, docs: list[Tensor]) -> list[Tensor]:
    """A right padded batch of first halves, then one of second halves: rows stand apart and bring different lengths."""
    cache = model.make_cache()
    halves = [[doc[: (len(doc) + 1) // 2] for doc in docs], [doc[(len(doc) + 1) // 2 :] for doc in docs]]
    seen, outputs = torch.zeros(len(docs), 0, dtype=torch.int64, device=DEVICE), []
    for half in halves:
        ids, mask = padded(half, "right")
        seen = torch.cat([seen, mask], dim=1)
        outputs.append(unpadded(model(ids, attention_mask=seen, past_key_values=cache).logits, mask))
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]


EXECUTIONS: dict[str, Execution] = {
    "with cache": with_cache,
    "packed by position_ids": packed_by_position_ids,
    "packed by cu_seqlens": packed_by_cu_seqlens,
    "packed and right padded": packed_and_right_padded,
    "left padded": partial(padded_batch, side="left"),
    "right padded": partial(padded_batch, side="right"),
    "prefill to TransPoint - 1": partial(chunks, sizes=[TRANS_POINT - 1, 1, 1, 20]),
    "prefill to TransPoint": partial(chunks, sizes=[TRANS_POINT, 5]),
    "prefill to TransPoint + 1": partial(chunks, sizes=[TRANS_POINT + 1, 2]),
    "chunks of three": partial(chunks, sizes=[3]),
    "token by token": partial(chunks, sizes=[1]),
    "left padded in chunks": partial(padded_batch_in_chunks, side="left", sizes=[9, 4]),
    "right padded in chunks": partial(padded_batch_in_chunks, side="right", sizes=[6, 1, 1, 4]),
    "left padded token by token": partial(padded_batch_in_chunks, side="left", sizes=[1]),
    "rows that go on unevenly": rows_that_go_on_unevenly,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_execution_gives_the_logits_of_the_document_alone(
    variant: str, execution: str, dtype: torch.dtype
) -> None:
    docs = documents(*LENGTHS)
    found = EXECUTIONS[execution](shared_model(variant, dtype), docs)
    assert worst_error(found, exact_logits(variant, dtype)) < BOUNDS[dtype]


@pytest.mark.parametrize("schedule", LONG_SCHEDULES, ids=str)
@pytest.mark.parametrize("sizes", [[63, 1, 1, 64], [64], [65, 63, 22], [129, 1]], ids=str)
def test_chunk_borders_and_trans_points_may_fall_anywhere(schedule: list[int | None], sizes: list[int]) -> None:
    docs = documents(*LONG_LENGTHS)
    for dtype, bound in BOUNDS.items():
        model = tiny_model(dtype, trans_points=schedule).requires_grad_(False)
        exact = alone(model, docs)
        assert worst_error(chunks(model, docs, sizes=sizes), exact) < bound
        assert worst_error(padded_batch_in_chunks(model, docs, side="left", sizes=sizes), exact) < bound


@pytest.mark.parametrize("schedule", LONG_SCHEDULES, ids=str)
def test_long_documents_agree_packed_padded_and_token_by_token(schedule: list[int | None]) -> None:
    docs = documents(*LONG_LENGTHS)
    model = tiny_model(torch.float32, trans_points=schedule).requires_grad_(False)
    exact = alone(model, docs)
    for execution in (packed_by_position_ids, packed_and_right_padded, partial(padded_batch, side="left")):
        assert worst_error(execution(model, docs), exact) < BOUNDS[torch.float32]
    assert worst_error(chunks(model, docs[:1], sizes=[1]), exact[:1]) < BOUNDS[torch.float32]


@pytest.mark.parametrize("schedule", ["mamba2", "transformer", "hybrid-1-1", [3, None, 0], [9, 6, 8]], ids=str)
def test_another_schedule_at_inference_is_the_model_of_that_schedule(schedule: str | list[int | None]) -> None:
    docs = documents(*LENGTHS)
    model = tiny_model(torch.float64).requires_grad_(False)
    other = tiny_model(torch.float64, trans_points=schedule).requires_grad_(False)
    other.load_state_dict(model.state_dict())
    exact = alone(other, docs)
    assert worst_error(alone(model, docs), exact) > 1e-2

    model.set_trans_points(schedule)
    assert model.config.trans_points == other.config.trans_points
    for name in ("packed by cu_seqlens", "left padded", "chunks of three", "rows that go on unevenly"):
        assert worst_error(EXECUTIONS[name](model, docs), exact) < BOUNDS[torch.float64]


@pytest.mark.parametrize("name", ["mamba2", "transformer"])
def test_trans_points_at_the_ends_are_the_baselines_bit_for_bit(name: str) -> None:
    ids = tokens(2, 19)
    model = tiny_model().requires_grad_(False)
    model.set_trans_points(name)
    baseline = model(ids, use_cache=False).logits
    for point in (0,) if name == "mamba2" else (19, 20, 1000, None):
        model.set_trans_points([point] * 3)
        assert torch.equal(model(ids, use_cache=False).logits, baseline)
    model.set_trans_points([1 if name == "mamba2" else 18] * 3)
    assert relative_rms_error(model(ids, use_cache=False).logits, baseline) > 1e-2


@pytest.mark.parametrize("execution", ["packed by position_ids", "left padded in chunks", "token by token"])
def test_in_bf16_no_execution_is_further_from_the_truth_than_twice_the_plain_one(execution: str) -> None:
    docs = documents(*LENGTHS)
    model = tiny_model(torch.bfloat16).requires_grad_(False)
    exact = alone(tiny_model(torch.bfloat16).double().requires_grad_(False), docs)
    plain = torch.cat(alone(model, docs))
    found = torch.cat(EXECUTIONS[execution](model, docs))
    rounding = relative_rms_error(plain, torch.cat(exact))
    assert 2**-9 < rounding < 2**-4
    assert relative_rms_error(found, torch.cat(exact)) < 2 * rounding


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_execution_gives_the_same_gradients(variant: str) -> None:
    docs = documents(*LENGTHS)
    model = tiny_model(torch.float64, **VARIANTS[variant])
    exact = gradients(model, alone, docs)
    unused = {name.rpartition("mixer.")[2] for name, _ in model.named_parameters()} - {
        name.rpartition("mixer.")[2] for name in exact
    }
    assert not unused, "each kind of parameter should have a gradient in some layer"
    assert all(gradient.any() for gradient in exact.values())
    for name in ("packed by position_ids", "packed by cu_seqlens", "packed and right padded", "left padded"):
        assert_same_gradients(gradients(model, EXECUTIONS[name], docs), exact)


@pytest.mark.parametrize("execution", ["with cache", "chunks of three", "token by token", "left padded in chunks"])
def test_gradients_flow_through_a_cache(execution: str) -> None:
    docs = documents(12, 5, TRANS_POINT)
    model = tiny_model(torch.float64)
    assert_same_gradients(gradients(model, EXECUTIONS[execution], docs), gradients(model, alone, docs))


def test_gradients_agree_over_several_chunks_of_the_scan() -> None:
    docs = documents(*LONG_LENGTHS)
    model = tiny_model(torch.float64, trans_points=[0, 64, 65])
    exact = gradients(model, alone, docs)
    assert_same_gradients(gradients(model, packed_by_position_ids, docs), exact)
    assert_same_gradients(gradients(model, partial(padded_batch, side="left"), docs), exact)


def test_a_switch_one_token_off_is_seen() -> None:
    model, docs = tiny_model(torch.float64).requires_grad_(False), documents(*LENGTHS)
    exact = alone(model, docs)
    model.set_trans_points([0, TRANS_POINT + 1, None])
    assert worst_error(chunks(model, docs, sizes=[3]), exact) > 1e-3


@pytest.mark.parametrize("fault", ["dt is dropped", "dt is shifted", "keys stay rotated"])
def test_faults_of_the_hand_over_are_seen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    model, docs = tiny_model(torch.float64).requires_grad_(False), documents(*LENGTHS)
    exact = alone(model, docs)
    mixer = import_module("transmamba.modules.mixer")
    convert = mixer.memory_converter
    if fault == "keys stay rotated":
        monkeypatch.setattr(mixer, "undo_rotary", lambda keys, cos, sin: keys)
    elif fault == "dt is dropped":
        monkeypatch.setattr(
            mixer,
            "memory_converter",
            lambda k, v, dt, A, **rest: convert(k, v / dt.mean(), torch.ones_like(dt) * dt.mean(), A),
        )
    else:
        monkeypatch.setattr(mixer, "memory_converter", lambda k, v, dt, A, **rest: convert(k, v, dt.roll(1, 1), A))
    assert worst_error(chunks(model, docs, sizes=[3]), exact) > 1e-3


def test_a_lost_past_of_the_convolution_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, docs = tiny_model(torch.float64).requires_grad_(False), documents(*LENGTHS)
    exact = alone(model, docs)
    monkeypatch.setattr(
        TransMambaLayerCache, "conv", property(lambda self: None, lambda self, value: None), raising=False
    )
    assert worst_error(chunks(model, docs, sizes=[3]), exact) > 1e-3


def test_documents_that_are_not_parted_are_seen() -> None:
    model, docs = tiny_model(torch.float64).requires_grad_(False), documents(*LENGTHS)
    together = model(torch.cat(docs)[None]).logits[0].split([len(doc) for doc in docs])
    assert worst_error(list(together)[1:], alone(model, docs)[1:]) > 1e-1


@cache
def exact_logits(variant: str, dtype: torch.dtype) -> list[Tensor]:
    return alone(shared_model(variant, dtype), documents(*LENGTHS))


def gradients(model: Model, execution: Execution, docs: list[Tensor]) -> dict[str, Tensor]:
    """Parameter gradients of one loss of the logits: a fixed random projection of each document's."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(7)
    loss: Any = 0.0
    for logits in execution(model, docs):
        weights = torch.randn(logits.shape, generator=generator, dtype=logits.dtype).to(DEVICE)
        loss = loss + (weights * logits).sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    errors = {name: relative_rms_error(found[name], exact[name]) for name in exact}
    assert not any(found[name].any() for name in found.keys() - exact.keys())
    assert max(errors.values()) < BOUNDS[torch.float64], max(errors.items(), key=lambda item: item[1])


def positions(docs: list[Tensor]) -> Tensor:
    return torch.cat([torch.arange(len(doc), device=DEVICE) for doc in docs])


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask, (rows, longest row)."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64, device=DEVICE)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        places = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[number, places], mask[number, places] = row, 1
    return ids, mask


def unpadded(x: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[kept.bool()] for row, kept in zip(x, mask, strict=True)]


def cuts(length: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of chunks of the given sizes; the last size is repeated until the length is reached."""
    ends, endless = [0], itertools.chain(sizes, itertools.repeat(sizes[-1]))
    while ends[-1] < length:
        ends.append(min(length, ends[-1] + next(endless)))
    return list(itertools.pairwise(ends))
