"""Initial values are those of the table: a model is drawn and every parameter compared."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from tests.models.language_models import VARIANTS, tiny_config
from transmamba import TransMambaConfig, TransMambaForCausalLM
from transmamba.models.transmamba import initial_values
from transmamba.models.transmamba.initial_values import find_initial_value

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 300,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_hidden_layers": 8,
    "trans_points": "0,7,none,...",
    "attention_bias": True,
    "mlp_bias": True,
    "mode_norm": True,
    "initializer_range": 0.02,
    "dt_min": 0.001,
    "dt_max": 0.1,
    "vocab_size": 400,
}


@pytest.fixture(scope="module")
def drawn() -> TransMambaForCausalLM:
    torch.manual_seed(0)
    return TransMambaForCausalLM(tiny_config(**WIDE))


def test_the_table_says_what_it_is_meant_to_say() -> None:
    table = {row.ending: row for row in initial_values(TransMambaConfig(num_hidden_layers=8))}
    expected = {
        "embed_tokens.weight": ("normal", 0.02, 0.0),
        "lm_head.weight": ("normal", 0.02, 0.0),
        "o_proj.weight": ("normal", 0.005, 0.0),  # 0.02 / sqrt(2 * 8)
        "down_proj.weight": ("normal", 0.005, 0.0),
        "proj.weight": ("normal", 0.02, 0.0),
        "proj.bias": ("constant", 0.0, 0.0),
        "conv1d.weight": ("uniform", -0.5, 0.5),  # 1 / sqrt(kernel)
        "conv1d.bias": ("constant", 0.0, 0.0),
        "A_log": ("log_uniform_A", 1.0, 16.0),
        "dt_bias": ("inverse_softplus_log_uniform", 0.001, 0.1),
        ".D": ("constant", 1.0, 0.0),
        "norm.weight": ("constant", 1.0, 0.0),
    }
    assert {ending: (row.distribution, row.a, row.b) for ending, row in table.items()} == expected


def test_every_parameter_is_drawn_as_its_row_says(drawn: TransMambaForCausalLM) -> None:
    table = initial_values(drawn.config)
    pooled: dict[str, list[Tensor]] = {}
    for name, parameter in drawn.named_parameters():
        pooled.setdefault(find_initial_value(table, name).ending, []).append(parameter.detach().flatten())
    assert set(pooled) == {row.ending for row in table}, "a row that no parameter has"
    for row in table:
        values = torch.cat(pooled[row.ending]).double()
        if row.distribution == "constant":
            assert (values == row.a).all(), row
        elif row.distribution == "normal":
            assert_moments(values, 0.0, row.a)
        else:
            if row.distribution == "log_uniform_A":
                values, low, high = values.exp(), row.a, row.b
            elif row.distribution == "inverse_softplus_log_uniform":
                values, low, high = softplus(values).log(), math.log(row.a), math.log(row.b)
            else:
                low, high = row.a, row.b
            assert low - 1e-4 <= values.min(), row
            assert values.max() <= high + 1e-4, row
            assert_moments(values, (low + high) / 2, (high - low) / math.sqrt(12))


def test_layers_are_drawn_independently(drawn: TransMambaForCausalLM) -> None:
    for name in ("A_log", "dt_bias", "q_proj.weight", "conv1d.weight"):
        first, second = (dict(drawn.model.layers[i].mixer.named_parameters())[name] for i in (0, 1))
        assert not torch.equal(first, second), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameter_is_without_a_row_and_none_is_left_undrawn(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant], initializer_range=0.25)
    table = initial_values(config)
    model = TransMambaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    for module in model.modules():
        model._init_weights(module)
    for name, parameter in model.named_parameters():
        assert find_initial_value(table, name) in table
        assert parameter.isfinite().all(), name


def test_a_seed_gives_a_model() -> None:
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(TransMambaForCausalLM(tiny_config()).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["lm_head.weight"], models[2]["lm_head.weight"])


def assert_moments(values: Tensor, mean: float, std: float) -> None:
    """Mean within five of its standard errors, standard deviation within 5 / sqrt(2 n) of itself."""
    count = len(values)
    assert count >= 256
    assert abs(values.mean() - mean) < 5 * std / math.sqrt(count)
    assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * count)
