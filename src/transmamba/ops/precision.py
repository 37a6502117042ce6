"""Ops decide their own precision: autocast, which would put cumulative sums and states into 16 bits, stops at their door."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_autocast(op: Callable[P, R]) -> Callable[P, R]:
    """Run an op whose first argument is a tensor as if autocast were off; its inputs keep the dtypes they have."""

    @wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
            return op(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return op(*args, **kwargs)

    return run
