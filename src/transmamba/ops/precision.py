"""Ops decide their own precision: autocast, which would put sums and states into 16 bits, stops at their door. Modules
leave it to autocast, but let it cast once what several products read.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")  # asking torch whether a device has it breaks torch.compile's graph


def outside_autocast(op: Callable[P, R]) -> Callable[P, R]:
    """Run an op as if autocast were off on its tensors' device; its inputs keep the dtypes they have."""

    @wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
        if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return op(*args, **kwargs)

    return run


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products on x's device, None where it is off or x is no fp32."""
    device = x.device.type
    if x.dtype != torch.float32 or device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast_once(x: Tensor) -> Tensor:
    """Return x as autocast would give it to each of several products; their gradients are then summed in that dtype."""
    dtype = autocast_dtype(x)
    return x if dtype is None else x.to(dtype)
