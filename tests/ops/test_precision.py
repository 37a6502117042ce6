"""Autocast stops at the ops' door: sums and states stay in fp32, whatever is around them."""

from typing import Any

import pytest
import torch

from tests.helpers import DEVICE
from tests.ops.cases import CHUNK, ssd_inputs, without
from transmamba.ops import hybrid_mixer, memory_converter, ssd_scan

TAKES_NOT = {ssd_scan: (), memory_converter: ("q", "D"), hybrid_mixer: ("initial_state",)}


@pytest.mark.parametrize("op", TAKES_NOT, ids=lambda op: op.__name__)
def test_autocast_changes_nothing(op: Any) -> None:
    inputs = without(ssd_inputs(seq_len=CHUNK + 9, dtype=torch.float32), *TAKES_NOT[op])
    options = {"trans_point": 5} if op is hybrid_mixer else {"validate": False}
    exact = op(**inputs, **options)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(op(**inputs, **options), exact)
        assert torch.equal(op(**options, **inputs), exact)  # no tensor comes first
        assert (inputs["k"] @ inputs["k"].transpose(-1, -2)).dtype == torch.bfloat16


def test_autocast_is_back_after_the_op() -> None:
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        ssd_scan(**ssd_inputs(dtype=torch.float32))
        assert torch.is_autocast_enabled(DEVICE.type)
