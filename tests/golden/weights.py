"""Weights and images that anyone can make again from names and shapes: integer hashes, so no generator is needed.

A golden number is what published code gave for such weights. Values are uniform, and keep activations near 1.
"""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def filled(name: str, shape: Sequence[int]) -> Tensor:
    """The tensor of this name and shape, fp32 (int64 for counters)."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    values = torch.from_numpy(uniform(name, math.prod(shape)).reshape(tuple(shape)))
    ending = name.rsplit(".", 1)[-1]
    if ending in ("A_log", "A_b_log", "A_logs"):
        values = values * 0.7 + 0.5
    elif ending in ("D", "D_b", "Ds") or (ending == "weight" and len(shape) == 1):
        values = 1 + values / 2  # of norms, too
    elif ending == "running_var":
        values = 1.5 + values
    elif name.endswith(("dt_proj.bias", "dt_proj_b.bias", "dt_projs_bias")):
        values = values - 2
    elif ending == "dt_projs_weight":
        values = values * (3 / shape[2]) ** 0.5
    elif ending == "x_proj_weight" or (len(shape) > 1 and ending == "weight"):
        fan_in = shape[-1] if ending == "x_proj_weight" else math.prod(shape[1:])
        values = values * (3 / fan_in) ** 0.5
    elif ending == "pixel_values":
        values = values * 1.7
    else:
        values = values * 0.3
    return values.float()


def filled_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A checkpoint of these shapes."""
    return {name: filled(name, shape) for name, shape in shapes.items()}


def uniform(name: str, count: int) -> np.ndarray:
    """count numbers in [-1, 1), fp64: splitmix64 of a counter that starts at the CRC of the name."""
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) / 2**52 - 1
