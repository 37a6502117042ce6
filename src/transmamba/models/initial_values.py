"""Initial values as a table: one row per kind of parameter, and how a row is drawn."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import initialization as init

Distribution = Literal[
    "normal",
    "truncated_normal",
    "uniform",
    "constant",
    "log_uniform_A",
    "log_counting",
    "inverse_softplus_log_uniform",
]


@dataclass(frozen=True)
class InitialValue:
    """normal: (0, a). truncated_normal: that, within two a. uniform: [a, b]. constant: a.

    log_uniform_A: log of uniform [a, b]. log_counting: log of 1, 2, ... along the last dimension.
    inverse_softplus_log_uniform: x such that softplus(x) is log-uniform in [a, b], times scale.
    """

    ending: str
    distribution: Distribution
    a: float = 0.0
    b: float = 0.0
    scale: float = 1.0


def find_initial_value(table: tuple[InitialValue, ...], name: str) -> InitialValue:
    """The row for the parameter of this name: the first whose ending fits."""
    for row in table:
        if name.endswith(row.ending):
            return row
    raise AssertionError(f"no initial value for {name}")


def apply_initial_value(parameter: Tensor, row: InitialValue, *, dt_init_floor: float) -> None:
    """Draw the parameter; values that were loaded from a checkpoint are left alone by transformers' `init`."""
    if row.distribution == "normal":
        init.normal_(parameter, mean=0.0, std=row.a)
    elif row.distribution == "truncated_normal":
        init.trunc_normal_(parameter, mean=0.0, std=row.a, a=-2 * row.a, b=2 * row.a)
    elif row.distribution == "uniform":
        init.uniform_(parameter, row.a, row.b)
    elif row.distribution == "constant":
        init.constant_(parameter, row.a)
    elif row.distribution == "log_uniform_A":
        init.copy_(parameter, torch.empty(parameter.shape).uniform_(row.a, row.b).log())
    elif row.distribution == "log_counting":
        init.copy_(parameter, torch.arange(1.0, parameter.shape[-1] + 1).log().expand(parameter.shape))
    else:
        log_dt = torch.empty(parameter.shape).uniform_(math.log(row.a), math.log(row.b))
        dt = log_dt.exp().clamp(min=dt_init_floor)
        init.copy_(parameter, row.scale * (dt + torch.log(-torch.expm1(-dt))))
