"""The cache: keys and values before the TransPoint, a state after it; what it can give back and what it refuses."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.helpers import relative_rms_error
from tests.models.language_models import TRANS_POINT, tiny_config, tiny_model, tokens
from transmamba import TransMambaCache, TransMambaForCausalLM, TransPointSchedule
from transmamba.errors import CacheError
from transmamba.modules.cache import BLOCK, REWIND
from transmamba.schedule import MixerShape

BOUND = 1e-10  # fp64
Model = TransMambaForCausalLM


def model_of(**changes: object) -> Model:
    return tiny_model(torch.float64, **changes).requires_grad_(False)


def filled(model: Model, ids: Tensor, **given: object) -> TransMambaCache:
    cache = model.make_cache()
    model(ids, past_key_values=cache, **given)
    return cache


def logits_after(model: Model, cache: TransMambaCache, ids: Tensor) -> Tensor:
    return model(ids, past_key_values=cache).logits


def test_keys_and_values_are_freed_at_the_switch() -> None:
    model, ids = model_of(trans_points=[TRANS_POINT] * 3), tokens(2, 20)
    cache = filled(model, ids[:, :TRANS_POINT])
    assert all(layer.keys is not None and layer.state is None for layer in cache.layers)
    logits_after(model, cache, ids[:, TRANS_POINT : TRANS_POINT + 1])
    for layer in cache.layers:
        assert layer.keys is layer.values is layer.dt is None
        assert layer.state.shape == (2, 4, 8, 8)
        assert layer.has_switched


def test_memory_drops_at_the_switch_and_is_constant_after() -> None:
    point = 2 * BLOCK
    config = {"trans_points": [point] * 3, "max_position_embeddings": 4 * BLOCK}
    model, ids = tiny_model(**config).requires_grad_(False), tokens(1, point + 40)
    cache = filled(model, ids[:, :point])
    before = cache.memory_bytes()
    after = []
    for step in range(point, point + 40):
        logits_after(model, cache, ids[:, step : step + 1])
        after.append(cache.memory_bytes())
    assert len(set(after[1:])) == 1  # the step that switches may still keep what crop needed before it
    assert after[0] < before / 2
    assert after[1] < before / 10


@pytest.mark.parametrize("schedule", ["transformer", "mamba2", "hybrid-1-1", [0, 300, None], [256, 512, 1000]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"num_state_heads": 2}, {"conv_kernel": 0}], ids=str)
def test_memory_is_what_the_schedule_says_up_to_a_block(
    schedule: str | list[int | None], dtype: torch.dtype, changes: dict[str, int]
) -> None:
    model = tiny_model(dtype, trans_points=schedule, max_position_embeddings=1024, **changes).requires_grad_(False)
    shape = MixerShape.from_config(model.config.to_dict(), bytes_per_element=dtype.itemsize)
    cost = model.config.schedule.cost(shape, 1024)
    ids = tokens(1, 600)
    cache = model.make_cache()
    per_token = 2 * shape.num_key_value_heads * shape.head_dim * dtype.itemsize + 4 * shape.num_state_heads
    rewind = cache.rewind * shape.conv_channels * dtype.itemsize if shape.conv_kernel else 0
    for start, end in ((0, 40), (40, 255), (255, 257), (257, 301), (301, 520), (520, 600)):
        logits_after(model, cache, ids[:, start:end])
        room = cache.memory_bytes() - cost.cache_bytes(end)
        growing = sum(mode == "attention" for mode in model.config.schedule.modes_at(end))
        assert 0 <= room <= growing * (BLOCK - 1) * per_token + 3 * rewind


def test_memory_of_a_whole_block_is_exact() -> None:
    model = tiny_model(trans_points=[0, 300, None], conv_kernel=0, max_position_embeddings=1024).requires_grad_(False)
    shape = MixerShape.from_config(model.config.to_dict(), bytes_per_element=4)
    cost = model.config.schedule.cost(shape, 1024)
    ids = tokens(1, 512)
    cache = filled(model, ids[:, :256])
    assert cache.memory_bytes() == cost.cache_bytes(256)
    logits_after(model, cache, ids[:, 256:])
    assert cache.memory_bytes() == cost.cache_bytes(512)


def test_rows_switch_one_by_one_and_the_others_stay() -> None:
    model, ids = model_of(), tokens(3, 12)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, :8] = mask[1, :5] = 0  # rows of 4, 7 and 12 tokens
    layer = filled(model, ids, attention_mask=mask).layers[1]
    assert layer.kv_rows == [0, 1]
    assert layer.kv_lengths == [4, TRANS_POINT]
    assert layer.keys.shape[0] == layer.values.shape[0] == layer.dt.shape[0] == 2
    assert not layer.state[:2].any()
    assert layer.state[2].any()


def test_reordered_rows_go_on_as_what_they_now_are() -> None:
    model, ids = model_of(), tokens(3, 14)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4] = 0  # rows in different modes
    order = torch.tensor([2, 0, 0])
    cache = filled(model, ids[:, :9], attention_mask=mask)
    cache.reorder_cache(order)
    found = logits_after(model, cache, ids[:, 9:])

    exact = logits_after(model, filled(model, ids[order, :9], attention_mask=mask[order]), ids[:, 9:])
    assert relative_rms_error(found, exact) < BOUND
    wrong = logits_after(model, filled(model, ids[:, :9], attention_mask=mask), ids[:, 9:])
    assert relative_rms_error(wrong, exact) > 1e-2


@pytest.mark.parametrize("past", [4, 10])
def test_repeated_and_selected_rows_go_on(past: int) -> None:
    model, ids = model_of(), tokens(2, 14)
    cache = filled(model, ids[:, :past])
    cache.batch_repeat_interleave(2)
    exact = filled(model, ids[[0, 0, 1, 1], :past])
    for step in range(past, 14):
        new = ids[[0, 1, 1, 0], step : step + 1]
        assert relative_rms_error(logits_after(model, cache, new), logits_after(model, exact, new)) < BOUND
    cache.batch_select_indices(torch.tensor([3]))
    exact.batch_select_indices(torch.tensor([3]))
    found, wanted = (logits_after(model, x, ids[:1, :2]) for x in (cache, exact))
    assert found.shape[0] == 1
    assert relative_rms_error(found, wanted) < BOUND


@pytest.mark.parametrize("conv_kernel", [0, 4])
@pytest.mark.parametrize("kept", [5, 3, 1, -1, -4])
def test_crop_before_any_switch_equals_recomputation(conv_kernel: int, kept: int) -> None:
    model = model_of(trans_points=[TRANS_POINT, 9, None], conv_kernel=conv_kernel)
    ids = tokens(2, 14)
    cache = filled(model, ids[:, :6])
    cache.crop(kept)
    length = kept if kept > 0 else 6 + kept
    assert cache.get_seq_length() == length
    other = torch.cat([ids[:, :length], tokens(2, 14, seed=9)[:, length:]], dim=1)
    exact = model(other, use_cache=False).logits[:, length:]
    assert relative_rms_error(logits_after(model, cache, other[:, length:]), exact) < BOUND


@pytest.mark.parametrize("conv_kernel", [0, 4])
def test_crop_to_nothing_begins_anew(conv_kernel: int) -> None:
    model = model_of(trans_points=[TRANS_POINT, 9, None], conv_kernel=conv_kernel)
    ids = tokens(2, 14)
    cache = filled(model, tokens(2, 6, seed=8))
    cache.crop(0)
    assert cache.get_seq_length() == cache.memory_bytes() == 0
    found = torch.cat([logits_after(model, cache, ids[:, :10]), logits_after(model, cache, ids[:, 10:])], dim=1)
    assert relative_rms_error(found, model(ids, use_cache=False).logits) < BOUND


def test_crop_that_takes_nothing_back_changes_nothing() -> None:
    model = model_of()
    cache = filled(model, tokens(1, 12))
    cache.crop(12)
    cache.crop(40)
    assert cache.get_seq_length() == 12


def test_crop_after_the_switch_is_refused_with_the_reason() -> None:
    model, ids = model_of(trans_points=[None, TRANS_POINT, None]), tokens(1, 12)
    cache = filled(model, ids)
    assert not cache.is_croppable
    before = copy.deepcopy(cache)
    with pytest.raises(CacheError, match=r"cannot take back 2 tokens: layer 1 has switched at TransPoint 7.*deepcopy"):
        cache.crop(10)
    with pytest.raises(CacheError, match="cannot take back 12 tokens"):
        cache.crop(0)
    new = tokens(1, 2, seed=4)
    assert torch.equal(logits_after(model, cache, new), logits_after(model, before, new))


def test_crop_beyond_what_is_kept_is_refused() -> None:
    model = model_of(trans_points=[None] * 3)
    cache = filled(model, tokens(1, 60))
    with pytest.raises(CacheError, match="cannot take back 61 tokens: the shortest row has 60"):
        cache.crop(-61)
    with pytest.raises(CacheError, match=f"layer 0 keeps the convolution's inputs for {REWIND}"):
        cache.crop(60 - REWIND - 1)
    cache.crop(60 - REWIND)
    assert cache.get_seq_length() == 60 - REWIND


def test_a_deep_copy_goes_on_by_itself() -> None:
    model, ids = model_of(), tokens(1, 20)
    cache = filled(model, ids[:, :5])
    twin = copy.deepcopy(cache)
    other = tokens(1, 8, seed=5)
    logits_after(model, twin, other)
    found = logits_after(model, cache, ids[:, 5:])
    assert relative_rms_error(found, model(ids, use_cache=False).logits[:, 5:]) < BOUND
    exact = model(torch.cat([ids[:, :5], other, ids[:, :1]], dim=1), use_cache=False).logits[:, -1:]
    assert relative_rms_error(logits_after(model, twin, ids[:, :1]), exact) < BOUND


def test_reset_forgets_everything() -> None:
    model, ids = model_of(), tokens(2, 12)
    cache = filled(model, tokens(3, 9, seed=6))
    cache.reset()
    assert cache.memory_bytes() == cache.get_seq_length() == 0
    assert not cache.is_initialized
    assert relative_rms_error(logits_after(model, cache, ids), model(ids, use_cache=False).logits) < BOUND


def test_cache_of_another_schedule_kind_or_batch_is_refused() -> None:
    model, ids = model_of(), tokens(2, 5)
    cache = filled(model, ids)
    with pytest.raises(CacheError, match="the cache holds 2 rows and the batch has 1"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(CacheError, match=r"past_key_values is a DynamicCache; pass a TransMambaCache"):
        model(ids, past_key_values=DynamicCache())
    model.set_trans_points("mamba2")
    with pytest.raises(CacheError, match=r"made for the schedule \[0, 7, None\] and the model runs \[0, 0, 0\]"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_keys_whose_rotation_depends_on_the_length_are_not_handed_over_wrongly(rope_type: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if rope_type == "longrope" else {}
    rope = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 256,
        **factors,
    }
    model, ids = model_of(rope_parameters=rope), tokens(1, 9)
    cache = filled(model, ids[:, :5])
    with pytest.raises(CacheError, match="changes its frequencies with the length"):
        logits_after(model, cache, ids[:, 5:])


def test_layers_know_their_own_form() -> None:
    config = tiny_config(mixer_form="standard", trans_points=[0, None, 0])
    cache = TransMambaForCausalLM(config).make_cache()
    assert [layer.conv_kernel for layer in cache.layers] == [4, 0, 4]
    assert [layer.trans_point for layer in cache.layers] == TransPointSchedule([0, None, 0])
