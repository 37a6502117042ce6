"""The search for launch configurations: the fastest that is right, kernel after kernel."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.kernels import launches, needs_triton
from transmamba.benchmarking import OpShape, Trial, TuneOptions, tune_ops
from transmamba.benchmarking.tune import candidates, search
from transmamba.errors import InputError
from transmamba.ops.tunings import find_tuning, forget_tunings

SHAPE = OpShape.parse("2x128x2x64")
pytestmark = needs_triton


def measure(calls: list[dict[str, Any]], kernel: str, name: str, changes: dict[str, Any]) -> Trial:
    """A machine on which 8 warps help forward, three stages are wrong, and 512 programs help a little."""
    calls.append(changes)
    trial = partial(Trial, shape=SHAPE.name, kernel=kernel, configuration=name)
    if any(getattr(value, "stages", 1) == 3 for value in changes.values()):
        return trial(error=1.0, failure="y is wrong")
    forward = changes.get("forward")
    gained = 0.4 * (forward is not None and forward.warps == 8) + 0.05 * (changes.get("programs") == 512)
    noise = 0.001 * len(calls)
    return trial(error=1e-3, forward=1.0 - gained - noise, both=3.0 - gained - noise)


def test_the_fastest_that_is_right_is_chosen() -> None:
    calls: list[dict[str, Any]] = []
    lines: list[str] = []
    trials, changes = search(SHAPE, ["forward", "programs"], partial(measure, calls), lines.append)
    assert trials[0].configuration == "as it is"
    assert calls[0] == {}
    assert set(changes) == {"forward", "programs"}
    assert changes["forward"].warps == 8
    assert changes["forward"].stages != 3
    assert changes["programs"] == 512
    # The first gain is kept for what comes after it, and differences within noise change nothing.
    assert all(call.get("forward") == changes["forward"] for call in calls if "programs" in call)
    assert len(trials) == 1 + len(list(candidates(SHAPE, ["forward", "programs"]))) == len(lines)


def test_nothing_is_chosen_where_nothing_is_faster() -> None:
    same = partial(Trial, shape=SHAPE.name, error=1e-3, forward=1.0, both=3.0)
    _, changes = search(SHAPE, ["states"], lambda kernel, name, given: same(kernel=kernel, configuration=name))
    assert changes == {}


def test_a_rule_that_is_wrong_ends_the_search() -> None:
    wrong = Trial(shape=SHAPE.name, kernel="", configuration="as it is", failure="dq is wrong")
    trials, changes = search(SHAPE, ["states"], lambda *given: wrong)
    assert trials == [wrong]
    assert changes == {}


def test_only_gradients_are_tried_in_narrow_tiles() -> None:
    wide = OpShape.parse("1x128x2x128")
    blocks = {
        (kernel, value.block)
        for kernel, _, value in candidates(wide, ["forward", "states", "gradients", "sweeps"])
        if value
    }
    assert blocks == {
        (kernel, block) for kernel in ("forward", "states", "gradients", "sweeps") for block in (64, 128)
    } | {("gradients", 32)}


def test_every_candidate_is_a_configuration_of_its_kernel() -> None:
    for kernel, _, value in candidates(SHAPE, ["forward", "states", "sweeps", "gradients", "programs"]):
        with launches().configured(**{kernel: value}):
            pass
        assert isinstance(value, int if kernel == "programs" else launches().Launch) or (kernel, value) == (
            "sweeps",
            None,
        )


def test_what_cannot_be_tuned_is_said() -> None:
    with pytest.raises(InputError, match=r"nothing to tune on cpu: it runs plain PyTorch\. Give a CUDA device"):
        tune_ops(torch.device("cpu"))
    with pytest.raises(InputError, match="kernels backward: choose of forward, states, sweeps, gradients and programs"):
        tune_ops(torch.device("cpu"), TuneOptions(kernels="backward"))


@pytest.mark.gpu
def test_a_search_on_a_card_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSMAMBA_TUNINGS", str(tmp_path / "tunings.json"))
    forget_tunings()
    result = tune_ops(torch.device("cuda"), TuneOptions(shapes="2x512x2x64", kernels="programs", seconds=0.02))
    assert not result.failures
    assert len(result.trials) == 4
    assert all(trial.error is not None and trial.error < 1e-2 for trial in result.trials)
    kept = find_tuning("ssd_scan", state_size=64, head_dim=64, dtype="torch.bfloat16")
    assert kept == (result.chosen["2x512 tokens, 2 heads of 64"] or None)
