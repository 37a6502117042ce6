"""Gradients of a sequence read in two parts: equal to those of slices, and not copied where they lie in their room."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import DEVICE
from tests.ops.cases import ssd_inputs, without
from tests.ops.kernels import launches, needs_triton, tuned
from transmamba.ops import hybrid_mixer
from transmamba.ops.rooms import Rooms

SIZE = (2, 7, 3)


def short_chunks(monkeypatch: pytest.MonkeyPatch) -> AbstractContextManager[None]:
    """Quick to interpret; a GPU runs what it always runs."""
    return tuned(monkeypatch, chunk=16, block=16) if DEVICE.type == "cpu" else nullcontext()


class Second(torch.autograd.Function):
    """Twice the second part; its gradient is written into the room."""

    @staticmethod
    def forward(ctx: Any, rooms: Rooms, x: Tensor) -> Tensor:
        ctx.rooms = rooms
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (room,) = ctx.rooms.make(ctx.saved_tensors[0])
        return None, room.copy_(2 * dy)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All rooms that are made, kept, so that no other tensor comes to lie where one was."""
    kept: list[Tensor] = []
    make = Rooms.make

    def spy(self: Rooms, *seconds: Tensor) -> list[Tensor]:
        rooms = make(self, *seconds)
        kept.extend(self._wholes)
        return rooms

    monkeypatch.setattr(Rooms, "make", spy)
    return kept


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


@pytest.mark.parametrize("reads", ["first", "second", "both", "second twice"])
def test_gradients_are_those_of_slices(made: list[Tensor], reads: str) -> None:
    x = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
    rooms = Rooms(4)
    ((first, second),) = rooms.split(x)
    assert torch.equal(torch.cat([first, second], dim=1), x)
    loss, exact = 0.0, torch.zeros(SIZE, dtype=torch.float64)
    if reads in ("first", "both"):
        loss = loss + first.square().sum()
        exact[:, :4] += 2 * x.detach()[:, :4]
    if reads != "first":
        loss = loss + Second.apply(rooms, second).square().sum()
        exact[:, 4:] += 8 * x.detach()[:, 4:]
    if reads == "second twice":
        loss = loss + second.sum()
        exact[:, 4:] += 1
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.allclose(found, exact, rtol=1e-12)
        assert (found.data_ptr() in addresses(made)) == (reads in ("second", "both"))
        assert not rooms._wholes  # or they would live as long as the graph


@needs_triton
@pytest.mark.parametrize("heads", [(2, 2, 2, 2), (4, 2, 2, 4)], ids=["equal", "grouped-query"])
def test_the_hybrid_writes_gradients_into_their_rooms(
    monkeypatch: pytest.MonkeyPatch, made: list[Tensor], heads: tuple[int, int, int, int]
) -> None:
    inputs = without(ssd_inputs(heads, seq_len=21, state_size=16, head_dim=16, dtype=torch.float32), "initial_state")
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with short_chunks(monkeypatch):
        y = hybrid_mixer(**leaves, trans_point=5, backend="triton")
        found = torch.autograd.grad(y.square().sum(), [leaves[name] for name in ("q", "k", "v")])
    assert addresses(found) == addresses(made)


@needs_triton
def test_the_registered_ops_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from transmamba.ops.hybrid_mixer import triton as hybrid
    from transmamba.ops.ssd_scan import triton as scan

    inputs = without(ssd_inputs((4, 2, 2, 4), seq_len=21, dtype=torch.float32), "initial_state")
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in inputs.values()]
    mix = partial(hybrid_mixer, trans_point=5, backend="triton", return_final_state=True)

    def run() -> list[Tensor]:
        y, state = mix(*leaves)
        return [y, state, *torch.autograd.grad(y.square().sum() + state.sum(), leaves)]

    with short_chunks(monkeypatch):
        direct = run()
        calls = []
        module = launches()
        for name in ("run_scan", "run_converter", "run_scan_backward", "run_converter_backward"):
            function = getattr(module, name)
            monkeypatch.setattr(module, name, partial(lambda f, n, *a: (calls.append(n), f(*a))[1], function, name))
        for file in (hybrid, scan):
            monkeypatch.setattr(file, "goes_around_registration", lambda *_: False)
        registered = run()
    assert sorted(set(calls)) == ["run_converter", "run_converter_backward", "run_scan", "run_scan_backward"]
    assert all(torch.equal(a, b) for a, b in zip(direct, registered, strict=True))
