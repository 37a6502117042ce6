"""Initial values of every parameter, in one table that a test reads."""

import math

from transmamba.models.initial_values import InitialValue, apply_initial_value, find_initial_value

from .configuration import TransMambaConfig

__all__ = ["InitialValue", "apply_initial_value", "find_initial_value", "initial_values"]


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
