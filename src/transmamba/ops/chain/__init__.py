"""Kernels of a chain may begin before those ahead of them are done: programmatic dependent launch.

Decoding is some hundred short kernels, each of which waits for the one ahead; between two of them the memory stands
idle. From Hopper on a kernel can be started early, read what no kernel of the chain writes, that is weights, and only
then wait.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["chained", "in_a_chain"]

_in_a_chain: ContextVar[bool] = ContextVar("in_a_chain", default=False)


@contextmanager
def chained() -> Iterator[None]:
    """Within, kernels of step_linear for one row and of conv_ssd_step may read before the kernels ahead of them are
    done, where the device can do so: their weights (of products, norms and convolution, D, A_log and biases) and
    positions.

    So no kernel that is itself started early may write these: weights do not change during a step, and positions are
    written by torch's own kernels, which end before anything behind them begins. All else that ops read and write may
    come from wherever it likes.
    """
    token = _in_a_chain.set(True)
    try:
        yield
    finally:
        _in_a_chain.reset(token)


def in_a_chain() -> bool:
    """Whether the caller said so."""
    return _in_a_chain.get()
