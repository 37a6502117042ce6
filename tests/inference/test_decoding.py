"""Warming up and timing recorded decode steps."""

import math

import pytest
import torch

from tests.helpers import DEVICE
from tests.models.language_models import tiny_model, tokens
from transmamba.errors import InputError
from transmamba.inference import measure_steps, warm_up
from transmamba.inference.decoding import fill_with_noise
from transmamba.models.transmamba import decoding
from transmamba.models.transmamba.decoding import Decoder, run_eagerly
from transmamba.modules import StaticCache


def test_generation_meets_nothing_new_after_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SMALLEST_CAPACITY", 8)
    model = tiny_model(torch.float64, trans_points=[5, 20, None]).requires_grad_(False)
    model.decoder = Decoder(run_eagerly)
    recorded = warm_up(model, batch_sizes=(1, 3), max_length=33)
    sessions = dict(model.decoder.sessions)
    assert sorted(sessions) == [(1, 32, 0), (4, 32, 0)]
    assert recorded == sum(len(session.steps) for session in sessions.values()) > 6
    for batch in (1, 3, 1):
        model.generate(tokens(batch, 3), max_new_tokens=30, do_sample=False, pad_token_id=0)
        assert model.decoder.sessions == sessions
        assert recorded == sum(len(session.steps) for session in sessions.values())
    before = model.generate(tokens(1, 4), max_new_tokens=29, do_sample=False, pad_token_id=0)
    assert warm_up(model, batch_sizes=(1,), max_length=33) == 0
    model.decoder = Decoder(enabled=False)
    assert torch.equal(model.generate(tokens(1, 4), max_new_tokens=29, do_sample=False, pad_token_id=0), before)


def test_what_cannot_be_warmed_up_says_why() -> None:
    model = tiny_model()
    if DEVICE.type == "cpu":
        with pytest.raises(InputError, match="recorded on CUDA devices, and the model is on cpu; move it there"):
            warm_up(model, max_length=20)
    model.decoder = Decoder(run_eagerly)
    with pytest.raises(InputError, match="max_length=1 and"):
        warm_up(model, max_length=1)
    with pytest.raises(InputError, match="cannot be recorded: the model is in training mode"):
        warm_up(model.train(), max_length=20)


@pytest.mark.parametrize("schedule", ["transformer", "mamba2", [0, 16, None]], ids=str)
def test_steps_are_timed_at_the_end_of_a_context(schedule: str | list[int | None]) -> None:
    model = tiny_model().requires_grad_(False)
    model.set_trans_points(schedule)
    point = measure_steps(model, batch=3, context=64, steps=8, repeats=1)
    assert 0 < point.quartiles[0] <= point.step_ms <= point.quartiles[1]
    assert point.tokens_per_second == pytest.approx(3000 / point.loop_ms)
    assert point.cache_bytes > 0
    with pytest.raises(InputError, match="context above 2 steps"):
        measure_steps(model, batch=3, context=8, steps=8)


def test_noise_fills_everything_and_is_finite() -> None:
    model = tiny_model()
    mixers = model.model._mixers()
    static = StaticCache(
        [mixer.config for mixer in mixers], [0, 7, None], rows=2, capacity=20, dtype=torch.float32, device=DEVICE
    )
    fill_with_noise(static)
    stored = [x for layer in static.layers for x in layer.tensors()]
    assert len(stored) == 2 + 5 + 3
    assert all(bool(x.any()) and math.isfinite(x.sum().item()) for x in stored)
    assert all(bool((layer.dt > 0).all()) for layer in static.layers if layer.dt is not None)
