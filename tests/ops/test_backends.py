"""One resolver chooses a backend, and says why."""

import pytest

from transmamba import ops
from transmamba.errors import InputError
from transmamba.ops import explain
from transmamba.ops.backends import resolve_backend

OPS = (
    "causal_conv1d",
    "hybrid_mixer",
    "memory_converter",
    "selective_scan",
    "softmax_attention",
    "ssd_scan",
    "ssd_step",
)


def test_every_op_is_explained_once() -> None:
    choices = explain("cpu")
    assert tuple(choice.op for choice in choices) == OPS
    assert all(choice.op in ops.__all__ for choice in choices)
    assert all(choice.reason for choice in choices)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_what_is_explained_is_what_runs(device: str) -> None:
    for choice in explain(device):
        assert choice.backend == resolve_backend(choice.op, None) == "torch"


@pytest.mark.parametrize("op", OPS)
def test_a_named_backend_is_taken_and_another_refused(op: str) -> None:
    assert resolve_backend(op, "reference") == "reference"
    with pytest.raises(InputError, match=f"{op} has no backend 'fast'; choose 'reference' or 'torch', or None"):
        resolve_backend(op, "fast")
