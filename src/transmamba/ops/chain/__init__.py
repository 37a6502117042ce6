"""Kernels of a chain that may begin before those ahead of them are done: programmatic dependent launch.

Decoding is some hundred short kernels, each of which waits for the one ahead; between two of them the memory stands
idle. From Hopper on a kernel can be started early, read what no kernel of the chain writes, that is weights, and only
then wait.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

__all__ = ["Chain", "chained", "current_chain"]


class Chain:
    """The weights that the products of one step read, in order: as they came the first time, for the others to know
    what comes next.
    """

    def __init__(self) -> None:
        self.products: list[tuple[Tensor, ...]] = []
        self.at = 0

    def after(self, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Count a product with these weights, and return the next one's; none where that is not known."""
        here = self.at
        self.at += 1
        if here == len(self.products):
            self.products.append(tuple(weights))
        if [x.data_ptr() for x in self.products[here]] != [x.data_ptr() for x in weights]:
            del self.products[here:]  # another step than the first time
            self.products.append(tuple(weights))
        return self.products[here + 1] if here + 1 < len(self.products) else ()


_chain: ContextVar[Chain | None] = ContextVar("chain", default=None)


@contextmanager
def chained(chain: Chain) -> Iterator[None]:
    """One step of a chain: within, kernels of step_linear and conv_ssd_step may read before the kernels ahead of them
    are done, where the device can do so: their weights (of products, norms and convolution, D, A_log and biases) and
    positions.

    So no kernel that is itself started early may write these: weights do not change during a step, and positions are
    written by torch's own kernels, which end before anything behind them begins. All else that ops read and write may
    come from wherever it likes.
    """
    chain.at = 0
    token = _chain.set(chain)
    try:
        yield
    finally:
        _chain.reset(token)


def current_chain() -> Chain | None:
    """The chain of the step that is under way."""
    return _chain.get()
