"""Counting and matching parameters."""

import pytest

from transmamba.errors import RecipeError
from transmamba.models import TransMambaConfig, TransMambaForCausalLM
from transmamba.recipes import count_parameters, match_parameters


def config(**changes: object) -> TransMambaConfig:
    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "trans_points": [0, 8, 16, None],
    }
    return TransMambaConfig(**settings | changes)


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_model(tied: bool) -> None:
    model = TransMambaForCausalLM(config(tie_word_embeddings=tied))
    assert count_parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("trans_points", [[None] * 4, [0] * 4, [0, None, 0, None]], ids=str)
def test_baselines_match_within_half_a_step(trans_points: list[int | None], mlp_bias: bool) -> None:
    target = count_parameters(config())
    baseline = config(mixer_form="standard", trans_points=trans_points, mlp_bias=mlp_bias)
    matched = match_parameters(baseline, target)
    step = (3 * 32 + 2 * mlp_bias) * 4
    assert abs(count_parameters(matched) - target) <= step / 2
    assert (matched.intermediate_size > baseline.intermediate_size) is (None in trans_points)
    assert {**matched.to_dict(), "intermediate_size": 0} == {**baseline.to_dict(), "intermediate_size": 0}


def test_the_config_given_is_left_alone() -> None:
    given = config()
    match_parameters(given, 10**6)
    assert given.intermediate_size == 88


def test_a_target_below_the_smallest_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="No intermediate_size brings this model down to 100 parameters: it has"):
        match_parameters(config(), 100)
