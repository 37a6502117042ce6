"""Initial values of every parameter, in one table that a test reads."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import initialization as init

from .configuration import TransMambaConfig

Distribution = Literal["normal", "uniform", "constant", "log_uniform_A", "inverse_softplus_log_uniform"]


@dataclass(frozen=True)
class InitialValue:
    """normal: (0, a). uniform: [a, b]. constant: a. log_uniform_A: log of uniform [a, b].

    inverse_softplus_log_uniform: x such that softplus(x) is log-uniform in [a, b].
    """

    ending: str
    distribution: Distribution
    a: float
    b: float = 0.0


def initial_values(config: TransMambaConfig) -> tuple[InitialValue, ...]:
    """One row per kind of parameter; the first row whose ending fits a parameter's name counts.

    std of projections into the residual stream is divided by sqrt(2 * layers), as in GPT-2. A_log and dt_bias are
    Mamba-2's.
    """
    std = config.initializer_range
    residual_std = std / math.sqrt(2 * config.num_hidden_layers)
    conv_bound = 1.0 / math.sqrt(max(1, config.conv_kernel))
    return (
        InitialValue("embed_tokens.weight", "normal", std),
        InitialValue("lm_head.weight", "normal", std),
        InitialValue("o_proj.weight", "normal", residual_std),
        InitialValue("down_proj.weight", "normal", residual_std),
        InitialValue("proj.weight", "normal", std),
        InitialValue("proj.bias", "constant", 0.0),
        InitialValue("conv1d.weight", "uniform", -conv_bound, conv_bound),
        InitialValue("conv1d.bias", "constant", 0.0),
        InitialValue("A_log", "log_uniform_A", config.A_init_range[0], config.A_init_range[1]),
        InitialValue("dt_bias", "inverse_softplus_log_uniform", config.dt_min, config.dt_max),
        InitialValue(".D", "constant", 1.0),
        InitialValue("norm.weight", "constant", 1.0),
        *((InitialValue("norm.bias", "constant", 0.0),) if config.norm_type == "layer" else ()),
        *((InitialValue("embed_positions.weight", "normal", std),) if config.position_embedding == "learned" else ()),
    )


def find_initial_value(table: tuple[InitialValue, ...], name: str) -> InitialValue:
    """The row for the parameter of this name."""
    for row in table:
        if name.endswith(row.ending):
            return row
    raise AssertionError(f"no initial value for {name}")


def apply_initial_value(parameter: Tensor, row: InitialValue, *, dt_init_floor: float) -> None:
    """Draw the parameter; values that were loaded from a checkpoint are left alone by transformers' `init`."""
    if row.distribution == "normal":
        init.normal_(parameter, mean=0.0, std=row.a)
    elif row.distribution == "uniform":
        init.uniform_(parameter, row.a, row.b)
    elif row.distribution == "constant":
        init.constant_(parameter, row.a)
    elif row.distribution == "log_uniform_A":
        init.copy_(parameter, torch.empty(parameter.shape).uniform_(row.a, row.b).log())
    else:
        log_dt = torch.empty(parameter.shape).uniform_(math.log(row.a), math.log(row.b))
        dt = log_dt.exp().clamp(min=dt_init_floor)
        init.copy_(parameter, dt + torch.log(-torch.expm1(-dt)))
