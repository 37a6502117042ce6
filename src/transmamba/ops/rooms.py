"""A sequence cut in two for two modes, whose gradients meet again without being copied.

Where tensors are split at a token, their gradients would be joined by a copy of all tokens. So the scan of the second
part writes its gradients into memory that has room for the first part in front, and only the first part is copied.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Rooms:
    """Memory for the gradients of whole sequences, (batch, tokens, ...), which are read in two parts."""

    def __init__(self, cut: int) -> None:
        self.cut = cut
        self._wholes: list[Tensor] = []

    def split(self, *tensors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor's tokens before and after the cut, as views."""
        parts = _Split.apply(self, *tensors)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def make(self, *seconds: Tensor) -> list[Tensor]:
        """Return memory for the gradients of second parts: those of the first tensors that were split."""
        self._wholes = [x.new_empty(x.shape[0], self.cut + x.shape[1], *x.shape[2:]) for x in seconds]
        return [whole[:, self.cut :] for whole in self._wholes]

    def forget(self) -> None:
        """Let go of what was made."""
        self._wholes = []

    def join(self, first: Tensor | None, second: Tensor | None, size: torch.Size) -> Tensor | None:
        """Return the gradient of a whole of this size; where the second part lies in its room, that is the whole."""
        given = first if second is None else second
        if given is None:
            return None
        whole = None
        if second is not None:
            rooms = (x for x in self._wholes if x.shape == size and x.dtype == second.dtype)
            whole = next((x for x in rooms if x[:, self.cut :].data_ptr() == second.data_ptr()), None)
        if whole is None:  # a hook, or a sum with another gradient, has made a tensor of its own of it
            whole = given.new_empty(size)
            _fill(whole[:, self.cut :], second)
        _fill(whole[:, : self.cut], first)
        return whole


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rooms: Rooms, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.rooms, ctx.sizes = rooms, [x.shape for x in tensors]
        return tuple(part for x in tensors for part in x.split((rooms.cut, x.shape[1] - rooms.cut), dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(gradients[::2], gradients[1::2], ctx.sizes, strict=True)
        wholes = [ctx.rooms.join(first, second, size) for first, second, size in pairs]
        ctx.rooms.forget()  # else the gradients of every layer would live as long as the graph
        return None, *wholes


def _fill(part: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        part.zero_()
    else:
        part.copy_(gradient)
