"""TransMambaConfig: Hugging Face's names, checked when made, the same after a round trip."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.models.language_models import tiny_config
from transmamba import TransMambaConfig, TransPointSchedule
from transmamba.errors import InputError, ScheduleError


@pytest.mark.parametrize("trans_points", [[0, 7, None], [None] * 3, [0] * 3, [3, 256, 100000]], ids=str)
def test_config_is_the_same_after_a_round_trip(tmp_path: Path, trans_points: list[int | None]) -> None:
    config = tiny_config(trans_points=trans_points, A_init_range=(2.0, 3.0), num_state_heads=2, mode_norm=True)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["trans_points"] == trans_points
    for loaded in (
        TransMambaConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        TransMambaConfig.from_dict(config.to_dict()),
    ):
        assert isinstance(loaded, TransMambaConfig)
        assert loaded.trans_points == trans_points
        # transformers writes its version and the dtype on saving
        assert loaded.to_diff_dict() | {"transformers_version": None} == config.to_diff_dict() | {
            "transformers_version": None
        }


def test_a_schedule_may_be_a_schedule_a_list_or_a_name() -> None:
    given = (TransPointSchedule([0, None, 0]), [0, None, 0], (0, None, 0), "hybrid-1-1", "0,none,0", "0,none,...")
    for schedule in given:
        assert tiny_config(trans_points=schedule).trans_points == [0, None, 0]
    assert type(tiny_config(trans_points=given[0]).trans_points) is list


def test_default_schedule_is_v9_that_never_switches_where_it_was_not_trained() -> None:
    config = TransMambaConfig(num_hidden_layers=9, max_position_embeddings=8192)
    assert config.trans_points == [0, 128, 256, 512, 1024, 2048, 4096, None, 0]
    assert TransMambaConfig(mixer_form="standard", num_hidden_layers=2).trans_points == [None, None]


def test_default_heads_are_those_of_attention() -> None:
    config = TransMambaConfig(hidden_size=96, num_attention_heads=6, num_hidden_layers=8)
    assert (config.num_key_value_heads, config.num_state_heads, config.head_dim) == (6, 6, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trans_points": [0, 7]}, ScheduleError, "2 entries and the model 3 layers"),
        ({"trans_points": [0, -7, 1]}, ScheduleError, "Layer 1 has TransPoint -7"),
        ({"trans_points": [0, 7, 0.5]}, ScheduleError, "Layer 2 has TransPoint 0.5"),
        ({"trans_points": [0, True, 1]}, ScheduleError, "Layer 1 has TransPoint True"),
        ({"trans_points": "mamba3"}, ScheduleError, "Did you mean 'mamba2'"),
        ({"num_key_value_heads": 3}, InputError, "num_key_value_heads=3 must divide num_state_heads=4"),
        ({"hidden_act": "unheard"}, InputError, "hidden_act='unheard' is unknown; choose gelu, "),
        ({"num_state_heads": 3}, InputError, "num_key_value_heads=2 must divide num_state_heads=3"),
        ({"num_state_heads": 8}, InputError, "num_state_heads=8 must divide num_attention_heads=4"),
        ({"num_attention_heads": 5}, InputError, "must divide"),
        ({"hidden_size": 34}, InputError, "num_attention_heads=4 must divide hidden_size=34"),
        ({"hidden_size": 0}, InputError, "hidden_size=0 must be at least 1"),
        ({"num_hidden_layers": 0}, InputError, "num_hidden_layers=0 must be at least 1"),
        ({"head_dim": 7}, InputError, "head_dim=7 must be even for rotary embedding; try 8"),
        ({"conv_kernel": -1}, InputError, "conv_kernel=-1 must be at least 0"),
        ({"intermediate_size": -1}, InputError, "intermediate_size=-1 must be at least 0"),
        ({"A_init_range": [0.0, 1.0]}, InputError, "A_init_range=.* must be 0 < low <= high"),
        ({"dt_min": 0.2, "dt_max": 0.1}, InputError, "dt_min=0.2 and dt_max=0.1"),
        ({"mixer_form": "plain"}, InputError, "mixer_form='plain' is unknown; choose 'shared' or 'standard'"),
        ({"mixer_form": "standard"}, InputError, "layer 1 has TransPoint 7, but mixer_form='standard'"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_the_way_out(
    changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny_config(**changes)
