"""Autocast stops at the ops' door."""

import pytest
import torch
from torch import Tensor

from transmamba.ops import hybrid_mixer, memory_converter, ssd_scan, ssd_step


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 90, 4, 8) for _ in range(3))
    return q, k, v, torch.rand(2, 90, 4), -torch.rand(4) - 0.1


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_results_under_autocast_are_those_without(backend: str) -> None:
    q, k, v, dt, A = inputs()
    state = memory_converter(k, v, dt, A, backend=backend)

    def results() -> list[Tensor]:
        return [
            *ssd_scan(q, k, v, dt, A, return_final_state=True, backend=backend),
            *ssd_step(state, q[:, 0], k[:, 0], v[:, 0], dt[:, 0], A, backend=backend),
            memory_converter(k, v, dt, A, backend=backend),
            *hybrid_mixer(q, k, v, dt, A, trans_point=70, return_final_state=True, backend=backend),
        ]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        actual = results()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_autocast_would_have_changed_them() -> None:
    q, k, v, dt, A = inputs()
    expected = ssd_scan(q, k, v, dt, A)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ssd_scan.__wrapped__(q, k, v, dt, A)
    assert not torch.equal(actual, expected)


def test_inputs_may_be_named() -> None:
    q, k, v, dt, A = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssd_scan(q=q, k=k, v=v, dt=dt, A=A), ssd_scan(q, k, v, dt, A))
