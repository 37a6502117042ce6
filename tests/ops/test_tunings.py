"""Launch configurations as data: kept per device and sizes, read in the place of the rule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops.kernels import launches, needs_triton
from transmamba.errors import InputError
from transmamba.ops import tunings
from transmamba.ops.tunings import find_tuning, forget_tunings, keep_tuning, tunings_file

SIZES: dict[str, Any] = {"state_size": 128, "head_dim": 128, "dtype": "torch.bfloat16"}
FORWARD = {"block": 32, "warps": 8, "stages": 2, "registers": 128}


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "tunings.json"
    monkeypatch.setenv("TRANSMAMBA_TUNINGS", str(path))
    monkeypatch.setattr(tunings, "_device_name", lambda: "card A")
    forget_tunings()
    return path


def test_an_entry_is_found_for_its_device_and_sizes_only(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_tuning("ssd_scan", **SIZES) is None
    assert keep_tuning("ssd_scan", "card A", {"forward": FORWARD}, **SIZES) == own_file
    keep_tuning("ssd_scan", "card B", {"programs": 512}, **SIZES)
    assert find_tuning("ssd_scan", **SIZES) == {"forward": FORWARD}
    assert find_tuning("ssd_scan", **{**SIZES, "head_dim": 64}) is None
    assert find_tuning("selective_scan", **SIZES) is None
    monkeypatch.setattr(tunings, "_device_name", lambda: "card B")
    assert find_tuning("ssd_scan", **SIZES) == {"programs": 512}
    monkeypatch.setattr(tunings, "_device_name", lambda: None)
    assert find_tuning("ssd_scan", **SIZES) is None


def test_a_later_entry_takes_the_place_of_an_earlier() -> None:
    for programs in (128, 512):
        keep_tuning("ssd_scan", "card A", {"programs": programs}, **SIZES)
    assert find_tuning("ssd_scan", **SIZES) == {"programs": 512}
    assert tunings_file().read_text(encoding="utf-8").count("card A") == 1


@pytest.mark.parametrize("content", ["{", "[1]", '[{"op": "ssd_scan"}]', '{"a": 1}'])
def test_a_broken_file_is_named(own_file: Path, content: str) -> None:
    own_file.parent.mkdir()
    own_file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"tunings\.json cannot be read .*; delete it, or run `transmamba bench tune`"):
        find_tuning("ssd_scan", **SIZES)


@needs_triton
def test_what_was_measured_takes_the_place_of_the_rule() -> None:
    module = launches()
    rule = module.tuning_of(128, 128, torch.bfloat16)
    keep_tuning("ssd_scan", "card A", {"forward": FORWARD, "programs": 99}, **SIZES)
    expected = replace(rule, forward=module.Launch(**FORWARD), programs=99)
    assert module.tuning_of(128, 128, torch.bfloat16) == expected != rule
    assert module.tuning_of(128, 128, torch.float32).programs != 99
