"""The benchmarks of models: rows for every schedule, a comparison that bites, and ratios of what was measured."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.helpers import DEVICE
from transmamba.benchmarking import DecodeOptions, ModelOptions, measure_decoding, measure_model
from transmamba.benchmarking import decode as decode_module
from transmamba.benchmarking import model as model_module
from transmamba.benchmarking.model import config_of, disagreement
from transmamba.errors import InputError, ScheduleError
from transmamba.models import TransMambaForCausalLM
from transmamba.modules.mixer import SSM_PARAMETERS

TINY = ModelOptions(
    layers=8,
    hidden_size=32,
    intermediate_size=48,
    heads=2,
    vocab_size=64,
    seq_len=64,
    batch_size=2,
    prefill="32,64",
    seconds=0.01,
    checked_tokens=64,
)


def test_a_step_and_prefills_of_every_schedule() -> None:
    result = measure_model(DEVICE, TINY)
    assert not result.failures
    assert [(row.schedule, row.what, row.tokens) for row in result.rows] == [
        (name, what, tokens)
        for name in ("v9", "transformer", "mamba2")
        for what, tokens in (("training step", 128), ("prefill", 32), ("prefill", 64))
    ]
    for row in result.rows:
        assert row.tokens_per_second == pytest.approx(row.tokens / row.timing.median * 1e3, rel=1e-3)
    step = {row.schedule: row.tokens_per_second for row in result.rows if row.what == "training step"}
    ratio = result.ratios["training step, 128 tokens"]["v9 over transformer"]
    assert ratio == pytest.approx(step["v9"] / step["transformer"], rel=1e-3)
    assert result.to_json()["options"]["seq_len"] == 64


def test_a_step_trains() -> None:
    """What is timed moves every parameter that a schedule uses."""
    torch.manual_seed(0)
    model = TransMambaForCausalLM(config_of(TINY, "v9")).to(DEVICE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model_module._training(model, TINY)
    still = {name for name, parameter in model.named_parameters() if torch.equal(before[name], parameter)}
    # The last TransPoint is the length of the step, so that layer's state space is never run. Elsewhere gradients of
    # decays and step biases may be too small for one step to show in fp32; those of matrices are not.
    assert {name for name in still if name.endswith("proj.weight")} == {
        "model.layers.7.mixer.dt_proj.weight",
        "model.layers.7.mixer.z_proj.weight",
    }
    assert all(name.partition(".mixer.")[2] in SSM_PARAMETERS for name in still)


def test_a_model_that_computes_otherwise_than_in_fp64_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = TransMambaForCausalLM(config_of(TINY, "v9")).to(DEVICE)
    assert disagreement(model, 64) < 1e-2
    copied = model_module.deepcopy

    def other(module: torch.nn.Module) -> torch.nn.Module:
        changed = copied(module)
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(1.1)
        return changed

    monkeypatch.setattr(model_module, "deepcopy", other)
    result = measure_model(DEVICE, replace(TINY, schedules="v9"))
    assert len(result.failures) == 1
    assert "not timed" in result.failures[0]
    assert not result.rows


def test_sizes_and_schedules_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ScheduleError, match="v99"):
        measure_model(DEVICE, replace(TINY, schedules="v99"))
    with pytest.raises(InputError, match="lengths of prompts"):
        measure_model(DEVICE, replace(TINY, prefill="long"))


def test_decoding_is_timed_behind_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"layers": 8, "hidden_size": 32, "intermediate_size": 48, "heads": 2, "vocab_size": 64}
    options = DecodeOptions(**sizes, schedules="v9,mamba2", batches="1,2", seq_len=128, context=100, steps=4)
    result = measure_decoding(DEVICE, options)
    assert not result.failures
    assert [(row.schedule, row.timing.batch) for row in result.rows] == list(product(("v9", "mamba2"), (1, 2)))
    assert all(row.timing.tokens_per_second > 0 for row in result.rows)
    monkeypatch.setattr(decode_module, "recorded_error", lambda *_: 0.5)
    assert len(measure_decoding(DEVICE, options).failures) == 2
