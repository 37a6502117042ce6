"""TransPoint schedules: what they accept, what they say, and that their costs are those of a count by hand."""

import copy
import json
import os
import pickle
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.helpers import ROOT
from transmamba.errors import InputError, ScheduleError, TransMambaError
from transmamba.schedule import MixerShape, TransPointSchedule, layer_flops

SHAPE = MixerShape(
    hidden_size=24,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_state_heads=4,
    head_dim=6,
    vocab_size=50,
    conv_kernel=4,
    chunk_size=8,
)


def shape_with(**changes: object) -> MixerShape:
    fields = {name: getattr(SHAPE, name) for name in SHAPE.__slots__}
    return MixerShape(**(fields | changes))


class TestEntries:
    def test_a_schedule_equals_lists_and_tuples_with_its_entries(self) -> None:
        schedule = TransPointSchedule([0, 7, None])
        assert schedule == [0, 7, None]
        assert [0, 7, None].__eq__(schedule) is NotImplemented  # so that Python asks the schedule
        assert schedule == (0, 7, None)
        assert schedule != [0, 7, 8]
        assert (schedule != [0, 7, None]) is False
        assert schedule != "0,7,none"

    def test_equal_schedules_have_equal_hashes(self) -> None:
        assert len({TransPointSchedule([0, None]), TransPointSchedule((0, None)), TransPointSchedule([0, 1])}) == 2

    def test_a_schedule_cannot_be_changed(self) -> None:
        schedule = TransPointSchedule([0, 1])
        with pytest.raises(TypeError):
            schedule[0] = 5  # type: ignore[index]
        with pytest.raises(AttributeError):
            schedule.extra = 1  # type: ignore[attr-defined]

    def test_copies_and_pickles_are_schedules(self) -> None:
        schedule = TransPointSchedule([0, 7, None])
        for twin in (copy.copy(schedule), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
            assert twin == schedule
            assert isinstance(twin, TransPointSchedule)

    def test_json_writes_a_plain_list(self) -> None:
        schedule = TransPointSchedule([0, 7, None])
        assert json.dumps(schedule) == json.dumps(schedule.to_list()) == "[0, 7, null]"
        assert type(schedule.to_list()) is list

    def test_numpy_integers_become_plain_ones(self) -> None:
        schedule = TransPointSchedule(np.array([0, 7]))
        assert schedule == [0, 7]
        assert all(type(entry) is int for entry in schedule)

    @pytest.mark.parametrize(
        ("bad", "layer"),
        [
            ([0, -1], 1),
            ([0.5], 0),
            ([0, 1, 128.0], 2),
            ([float("nan")], 0),
            ([float("inf")], 0),
            ([True], 0),
            ([0, "7"], 1),
            ([[0]], 0),
        ],
    )
    def test_a_bad_entry_is_refused_with_its_layer_and_value(self, bad: list, layer: int) -> None:
        with pytest.raises(ScheduleError) as caught:
            TransPointSchedule(bad)
        assert f"Layer {layer} " in str(caught.value)
        assert repr(bad[layer]) in str(caught.value)

    @pytest.mark.parametrize("bad", [[], (), 3, None, {0: 1}, "v9"])
    def test_what_is_no_list_of_entries_is_refused(self, bad: object) -> None:
        with pytest.raises(ScheduleError):
            TransPointSchedule(bad)  # type: ignore[arg-type]

    def test_the_error_for_a_text_names_parse(self) -> None:
        with pytest.raises(ScheduleError, match=r"'v9'.*TransPointSchedule\.parse"):
            TransPointSchedule("v9")  # type: ignore[arg-type]

    def test_errors_are_the_librarys_own(self) -> None:
        assert issubclass(ScheduleError, TransMambaError)

    def test_repr_rebuilds_the_schedule(self) -> None:
        schedule = TransPointSchedule([0, 7, None])
        assert eval(repr(schedule)) == schedule


class TestNames:
    def test_published_schedules_are_those_of_the_paper(self) -> None:
        # switching.md 5.3: mean TransPoint of each schedule at 8192 tokens, rounded.
        means = {
            "v1": 2048,
            "v2": 4096,
            "v3": 6144,
            "v4": 4096,
            "v5": 3072,
            "v6": 1195,
            "v7": 4096,
            "v8": 3482,
            "v9": 2032,
        }
        for name, mean in means.items():
            schedule = TransPointSchedule.named(name, num_layers=120, seq_len=8192)
            assert round(sum(schedule) / 120) == mean, name

    def test_v9_is_the_cycle_of_eight(self) -> None:
        cycle = [0, 128, 256, 512, 1024, 2048, 4096, 8192]
        assert TransPointSchedule.named("v9", 24) == cycle * 3
        assert TransPointSchedule.named("v9", 10) == [*cycle, 0, 128]
        assert TransPointSchedule.named("V9", 3) == cycle[:3]

    def test_v4_repeats_as_in_the_paper(self) -> None:
        assert TransPointSchedule.named("v4", 6) == [3072, 4096, 5120, 3072, 4096, 5120]

    def test_published_schedules_scale_with_the_length(self) -> None:
        assert TransPointSchedule.named("v9", 8, seq_len=256) == [0, 4, 8, 16, 32, 64, 128, 256]
        assert TransPointSchedule.named("v9", 8, seq_len=64) == [0, 1, 2, 4, 8, 16, 32, 64]
        assert TransPointSchedule.named("v9", 8, seq_len=16384) == [0, 256, 512, 1024, 2048, 4096, 8192, 16384]

    def test_lengths_that_do_not_divide_are_rounded(self) -> None:
        # 1000 / 64 = 15.625, 31.25, 62.5, 125, 250, 500, 1000; halves go up.
        assert TransPointSchedule.named("v9", 8, seq_len=1000) == [0, 16, 31, 63, 125, 250, 500, 1000]

    @pytest.mark.parametrize("name", [f"v{index}" for index in range(1, 10)])
    def test_every_length_either_keeps_entries_apart_or_is_refused(self, name: str) -> None:
        distinct = len(set(TransPointSchedule.named(name, 8)))
        for seq_len in range(1, 200):
            try:
                schedule = TransPointSchedule.named(name, 8, seq_len=seq_len)
            except ScheduleError as error:
                enough = int(str(error).split("at least ")[1].split()[0])
                assert enough > seq_len
                assert len(TransPointSchedule.named(name, 8, seq_len=enough)) == 8
            else:
                assert len(set(schedule)) == distinct
                assert max(schedule) <= seq_len

    def test_the_error_for_a_short_sequence_names_length_and_way_out(self) -> None:
        with pytest.raises(ScheduleError, match=r"seq_len=20 is too short for 'v9'.*at least \d+ tokens"):
            TransPointSchedule.named("v9", 8, seq_len=20)

    def test_baselines_do_not_depend_on_the_length(self) -> None:
        for seq_len in (1, 8192):
            assert TransPointSchedule.named("transformer", 3, seq_len) == [None] * 3
            assert TransPointSchedule.named("mamba2", 3, seq_len) == [0] * 3
            assert TransPointSchedule.named("hybrid-1-1", 5, seq_len) == [0, None, 0, None, 0]
            assert TransPointSchedule.named("hybrid-1-7", 9, seq_len) == [0, 0, 0, 0, None, 0, 0, 0, 0]

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(ScheduleError) as caught:
            TransPointSchedule.named("mamba-2", 4)
        message = str(caught.value)
        assert "Did you mean 'mamba2'?" in message
        assert all(name in message for name in TransPointSchedule.names())

    @pytest.mark.parametrize("name", TransPointSchedule.names())
    def test_every_name_makes_a_schedule(self, name: str) -> None:
        assert len(TransPointSchedule.named(name, 24)) == 24

    @pytest.mark.parametrize(("num_layers", "seq_len"), [(0, 8), (-1, 8), (1.5, 8), (True, 8), (4, 0), (4, 8.0)])
    def test_counts_that_are_none_are_refused(self, num_layers: int, seq_len: int) -> None:
        with pytest.raises(InputError, match="must be a whole number >= 1"):
            TransPointSchedule.named("mamba2", num_layers, seq_len)


class TestParse:
    def test_a_name_or_a_list_is_understood(self) -> None:
        assert TransPointSchedule.parse("v9", 8, 256) == TransPointSchedule.named("v9", 8, 256)
        assert TransPointSchedule.parse("0, 128 ,None", 3, 256) == [0, 128, None]
        assert TransPointSchedule.parse("none", 1, 256) == [None]

    def test_an_ellipsis_repeats_the_entries(self) -> None:
        assert TransPointSchedule.parse("0,none,...", 5, 256) == [0, None, 0, None, 0]

    @pytest.mark.parametrize("entries", [[0, 128, None], [None], [5]])
    def test_str_is_read_back(self, entries: list) -> None:
        schedule = TransPointSchedule(entries)
        assert TransPointSchedule.parse(str(schedule), len(entries), 256) == schedule

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("0,-3", "Layer 1 has TransPoint -3"),
            ("0,1.5", "Layer 1 has TransPoint '1.5'"),
            ("nan,0", "Layer 0 has TransPoint 'nan'"),
            ("", "Layer 0 has TransPoint ''"),
            ("0,,1", "Layer 1 has TransPoint ''"),
            ("...", "Layer 0 has TransPoint '...'"),
            ("0,...,1", "Layer 1 has TransPoint '...'"),
            ("0,1,2", "3 entries and the model 2 layers"),
            ("v10", "no schedule named 'v10'"),
        ],
    )
    def test_bad_text_is_refused_with_layer_and_value(self, text: str, message: str) -> None:
        with pytest.raises(ScheduleError) as caught:
            TransPointSchedule.parse(text, 2, 256)
        assert message in str(caught.value)


class TestMeaning:
    def test_the_token_at_the_trans_point_is_the_first_of_the_ssm(self) -> None:
        schedule = TransPointSchedule([0, 5, None])
        assert schedule.modes_at(0) == ("ssm", "attention", "attention")
        assert schedule.modes_at(4) == ("ssm", "attention", "attention")
        assert schedule.modes_at(5) == ("ssm", "ssm", "attention")
        assert schedule.modes_at(10**9) == ("ssm", "ssm", "attention")

    def test_v9_has_fewer_attention_layers_in_every_segment(self) -> None:
        # switching.md 5.4
        schedule = TransPointSchedule.named("v9", 8)
        segments = schedule.segments(8192)
        assert segments == [(0, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]
        for (start, end), layers in zip(segments, range(7, 0, -1), strict=True):
            assert schedule.modes_at(start).count("attention") == layers
            assert schedule.modes_at(end - 1).count("attention") == layers

    def test_segments_cover_the_sequence_even_without_switches(self) -> None:
        assert TransPointSchedule([0, None, 900]).segments(100) == [(0, 100)]
        assert TransPointSchedule([1, 99]).segments(100) == [(0, 1), (1, 99), (99, 100)]

    def test_a_quarter_of_v9_is_attention(self) -> None:
        # switching.md 5.4 says 25 %; the mean of the entries is 2032 of 8192.
        assert TransPointSchedule.named("v9", 8).attention_share(8192) == 2032 / 8192
        assert TransPointSchedule([None, 0, 50, 1000]).attention_share(100) == (100 + 0 + 50 + 100) / 400

    @pytest.mark.parametrize(("position", "mean"), [(127, 111), (511, 319), (2047, 768), (4095, 1024), (8191, 1024)])
    def test_v9_keeps_the_listed_number_of_keys(self, position: int, mean: int) -> None:
        # switching.md 8
        assert round(sum(TransPointSchedule.named("v9", 8).kv_tokens(position)) / 8) == mean

    def test_layers_that_never_ran_their_ssm_stay_attention(self) -> None:
        assert TransPointSchedule([0, 63, 64, 65, None]).stays_attention_from(64) == [0, 63, None, None, None]

    def test_a_wrong_number_of_layers_is_refused_with_both_numbers(self) -> None:
        schedule = TransPointSchedule([0, 1, 2])
        assert schedule.check_num_layers(3) is schedule
        with pytest.raises(ScheduleError, match="3 entries and the model 4 layers"):
            schedule.check_num_layers(4)

    @pytest.mark.parametrize("position", [-1, 0.5, True])
    def test_a_position_is_a_whole_number(self, position: int) -> None:
        with pytest.raises(InputError, match="position="):
            TransPointSchedule([0]).modes_at(position)


def count_by_hand(shape: MixerShape, trans_point: int | None, tokens: int) -> dict[str, int]:
    """FLOPs of one layer, added up product by product as an implementation would run them."""
    point = tokens if trans_point is None else min(trans_point, tokens)
    d, n, p = shape.hidden_size, shape.head_dim, shape.head_dim
    counted = {"attention": 0, "ssd": 0, "converter": 0, "projections": 0, "mlp": 0}
    for query in range(point):
        for _key in range(query + 1):
            for _head in range(shape.num_attention_heads):
                counted["attention"] += 2 * n  # q k
                counted["attention"] += 2 * p  # weight times v
    suffix = list(range(point, tokens))
    for start in range(0, len(suffix), shape.chunk_size):
        chunk = suffix[start : start + shape.chunk_size]
        for index, _query in enumerate(chunk):
            if len(suffix) > 1:
                counted["ssd"] += shape.num_attention_heads * (index + 1) * (2 * n + 2 * p)
            counted["ssd"] += shape.num_attention_heads * 2 * n * p  # q H
            counted["ssd"] += max(shape.num_key_value_heads, shape.num_state_heads) * 2 * n * p  # k v^T
    if trans_point is not None and trans_point < tokens:
        for _token in range(trans_point):
            counted["converter"] += max(shape.num_key_value_heads, shape.num_state_heads) * 2 * n * p
    q_width, kv_width = shape.num_attention_heads * n, shape.num_key_value_heads * n
    for position in range(tokens):
        counted["projections"] += 2 * d * q_width + 2 * 2 * d * kv_width + 2 * q_width * d
        counted["projections"] += shape.conv_kernel * 2 * (q_width + 2 * kv_width)
        if trans_point is not None:
            counted["projections"] += 2 * d * shape.num_state_heads
        if position >= point and shape.use_gate:
            counted["projections"] += 2 * d * q_width
        counted["mlp"] += 3 * 2 * d * shape.intermediate_size
    return counted


class TestBetween:
    def test_doubling_transpoints_stay_so_and_the_ends_are_kept(self) -> None:
        start = TransPointSchedule([0, 63, 255, None])
        family = start.between([None] * 4, 5, 255)
        assert (family[0], family[-1]) == (start, [None] * 4)
        # P + 1 grows by (256 / 1)^(1/4) = 4 a step in the first layer, by 4^(1/4) in the second, not in the third.
        assert [schedule[0] for schedule in family] == [0, 3, 15, 63, None]
        assert [schedule[1] for schedule in family] == [63, 90, 127, 180, None]
        assert {schedule[2] for schedule in family} == {255, None}
        assert {schedule[3] for schedule in family} == {None}

    def test_every_layer_moves_one_way(self) -> None:
        start = TransPointSchedule([0, 1, 7, 100, 300, None])
        family = start.between(TransPointSchedule([None, 0, 90, 100, None, 3]), 9, 256)
        for layer, falls in enumerate([False, True, False, False, False, True]):
            heights = [256 if s[layer] is None else min(s[layer], 256) for s in family]
            assert heights == sorted(heights, reverse=falls)

    def test_attention_grows_on_the_way_to_attention(self) -> None:
        family = TransPointSchedule.named("v9", 8, 512).between([None] * 8, 5, 512)
        shares = [schedule.attention_share(512) for schedule in family]
        assert shares == sorted(set(shares))
        assert shares[-1] == 1

    def test_there_and_back_is_the_same_way(self) -> None:
        one, other = TransPointSchedule([0, 9, None]), TransPointSchedule([None, 3, 0])
        assert one.between(other, 6, 100) == other.between(one, 6, 100)[::-1]

    def test_one_schedule_is_itself(self) -> None:
        assert TransPointSchedule([0, None]).between([0, None], 1, 64) == [[0, None]]
        with pytest.raises(ScheduleError, match="count=1 has no room for two"):
            TransPointSchedule([0, None]).between([0, 0], 1, 64)

    @pytest.mark.parametrize(
        ("other", "count", "seq_len", "message"),
        [([0], 3, 64, "1 entries"), ([0, 0], 0, 64, "count=0"), ([0, 0], 3, 0, "seq_len=0")],
    )
    def test_what_does_not_fit_is_refused(self, other, count: int, seq_len: int, message: str) -> None:
        with pytest.raises(TransMambaError, match=message):
            TransPointSchedule([0, None]).between(other, count, seq_len)


class TestFlops:
    @pytest.mark.parametrize("trans_point", [0, 1, 7, 8, 18, 19, 20, None])
    @pytest.mark.parametrize("tokens", [1, 8, 19])
    @pytest.mark.parametrize("kv_heads", [1, 4])
    @pytest.mark.parametrize("state_heads", [2, 4])
    def test_a_forward_pass_costs_what_a_count_by_hand_gives(
        self, trans_point: int | None, tokens: int, kv_heads: int, state_heads: int
    ) -> None:
        shape = shape_with(num_key_value_heads=kv_heads, num_state_heads=state_heads)
        flops = layer_flops(shape, trans_point, 0, tokens)
        counted = count_by_hand(shape, trans_point, tokens)
        assert {name: getattr(flops, name) for name in counted} == counted
        assert flops.total == sum(counted.values())

    @pytest.mark.parametrize("changes", [{"use_gate": False}, {"conv_kernel": 0}, {"intermediate_size": 0}])
    def test_what_a_model_lacks_costs_nothing(self, changes: dict) -> None:
        shape = shape_with(**changes)
        counted = count_by_hand(shape, 7, 19)
        assert layer_flops(shape, 7, 0, 19).total == sum(counted.values()) < layer_flops(SHAPE, 7, 0, 19).total

    def test_the_textbook_formulas_hold(self) -> None:
        # switching.md 5.2: attention 2 P^2 d, SSD 4 (T - P) d (Q / 2 + n), converter 2 P n d; all heads separate.
        shape = shape_with(num_key_value_heads=4, hidden_size=96, head_dim=24, chunk_size=64)
        d, n, chunk, point, tokens = 96, 24, 64, 1024, 4096
        flops = layer_flops(shape, point, 0, tokens)
        assert flops.attention == 2 * point * (point + 1) * d
        assert flops.ssd == 4 * (tokens - point) * d * n + 2 * (tokens - point) * d * (chunk + 1)
        assert flops.converter == 2 * point * n * d

    @pytest.mark.parametrize("trans_point", [0, 1, 5, 6, 12, 13, None])
    def test_attention_and_converter_do_not_depend_on_how_a_prompt_is_cut(self, trans_point: int | None) -> None:
        whole = layer_flops(SHAPE, trans_point, 0, 13)
        for cut in range(14):
            first, second = layer_flops(SHAPE, trans_point, 0, cut), layer_flops(SHAPE, trans_point, cut, 13)
            for part in ("attention", "converter", "projections", "mlp"):
                assert getattr(first, part) + getattr(second, part) == getattr(whole, part), (cut, part)

    def test_totals_add_the_layers_and_the_head(self) -> None:
        schedule = TransPointSchedule([0, 7, None])
        cost = schedule.cost(SHAPE, 20)
        counted = [count_by_hand(SHAPE, entry, 20) for entry in schedule]
        for part in ("attention", "ssd", "converter", "projections", "mlp"):
            assert getattr(cost, part) == sum(layer[part] for layer in counted)
        assert cost.head == 20 * 2 * 24 * 50
        assert cost.total == sum(sum(layer.values()) for layer in counted) + cost.head

    def test_decoding_reads_every_key_before_the_switch_and_one_state_after(self) -> None:
        schedule, head = TransPointSchedule([9]), 2 * 24 * 50
        cost = schedule.cost(SHAPE, 20)
        shared = 2 * 24 * (SHAPE.conv_channels + 24 + SHAPE.num_state_heads) + 2 * 4 * SHAPE.conv_channels + 6 * 24 * 40
        state = 2 * 6 * 6 * 4
        assert cost.decode_flops(8) == head + shared + 4 * (2 * 6 + 2 * 6) * 9
        assert cost.decode_flops(10) == head + shared + 2 * 24 * 24 + 2 * state
        assert cost.decode_flops(9) == cost.decode_flops(10) + 9 * state

    def test_a_transformer_spends_all_its_mixing_on_attention(self) -> None:
        cost = TransPointSchedule.named("transformer", 3).cost(SHAPE, 50)
        assert (cost.ssd, cost.converter) == (0, 0)
        assert cost.attention == 3 * 2 * 50 * 51 * 24

    def test_the_standard_transformer_has_no_convolution(self) -> None:
        convolution = 2 * 4 * SHAPE.conv_channels * 50
        standard = shape_with(mixer_form="standard")
        for name, saved in (("transformer", convolution), ("mamba2", 0)):
            schedule = TransPointSchedule.named(name, 1)
            assert schedule.cost(SHAPE, 50).total - schedule.cost(standard, 50).total == saved

    def test_a_span_that_ends_before_it_begins_is_refused(self) -> None:
        with pytest.raises(InputError, match="end=3 must not be below start=4"):
            layer_flops(SHAPE, None, 4, 3)


class TestCache:
    @pytest.mark.parametrize("trans_point", [0, 1, 7, None])
    @pytest.mark.parametrize("position", [0, 1, 6, 7, 8])
    @pytest.mark.parametrize("conv_kernel", [0, 1, 4])
    def test_bytes_are_those_of_the_tensors_kept(
        self, trans_point: int | None, position: int, conv_kernel: int
    ) -> None:
        shape = shape_with(conv_kernel=conv_kernel)
        tensors = []
        if trans_point is not None and position >= trans_point:
            tensors.append(np.zeros((4, 6, 6), np.float32))
        else:
            tensors += [np.zeros((position, 2, 6), np.float16), np.zeros((position, 2, 6), np.float16)]
            if trans_point is not None:
                tensors.append(np.zeros((position, 4), np.float32))
        if conv_kernel:
            tensors.append(np.zeros((conv_kernel - 1, (4 + 2 + 2) * 6), np.float16))
        cost = TransPointSchedule([trans_point]).cost(shape, 20)
        assert cost.cache_bytes(position) == sum(tensor.nbytes for tensor in tensors)

    def test_the_paper_sized_state_is_590_kb(self) -> None:
        # switching.md 8: d = 1536, n = 96, fp32
        shape = shape_with(
            num_attention_heads=16, num_key_value_heads=16, num_state_heads=16, head_dim=96, conv_kernel=0
        )
        assert TransPointSchedule([0]).cost(shape, 8192).cache_bytes(8192) == 589_824

    def test_v9_stops_growing_at_its_last_trans_point(self) -> None:
        cost = TransPointSchedule.named("v9", 8, 256).cost(SHAPE, 256)
        assert cost.cache_bytes(255) > cost.cache_bytes(256) == cost.cache_bytes(10_000)

    def test_the_standard_transformer_keeps_no_convolution_tail(self) -> None:
        standard = shape_with(mixer_form="standard")
        assert TransPointSchedule([None]).cost(standard, 20).cache_bytes(0) == 0
        assert TransPointSchedule([None]).cost(SHAPE, 20).cache_bytes(0) == 3 * 8 * 6 * 2


class TestTable:
    def test_a_row_per_layer_agrees_with_modes_and_costs(self) -> None:
        schedule = TransPointSchedule([0, 7, None])
        positions, lengths = [0, 7], [5, 20]
        rows = schedule.table(SHAPE, positions=positions, lengths=lengths)
        assert [row.layer for row in rows] == [0, 1, 2]
        assert [row.trans_point for row in rows] == schedule
        for index, position in enumerate(positions):
            assert tuple(row.modes[index] for row in rows) == schedule.modes_at(position)
        for index, length in enumerate(lengths):
            assert sum(row.cache_bytes[index] for row in rows) == schedule.cost(SHAPE, 1).cache_bytes(length)


class TestShape:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_size": 0}, "hidden_size=0"),
            ({"head_dim": 2.5}, "head_dim=2.5"),
            ({"conv_kernel": -1}, "conv_kernel=-1"),
            ({"vocab_size": True}, "vocab_size=True"),
            ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
            ({"num_state_heads": 8}, "num_state_heads=8 must divide"),
            ({"mixer_form": "plain"}, "mixer_form='plain'"),
            ({"use_gate": 1}, "use_gate=1"),
        ],
    )
    def test_impossible_sizes_are_refused_by_name(self, change: dict, message: str) -> None:
        with pytest.raises(InputError) as caught:
            shape_with(**change)
        assert message in str(caught.value)

    def test_heads_that_neither_divide_nor_are_divided_are_refused(self) -> None:
        with pytest.raises(InputError, match="num_state_heads=3"):
            shape_with(num_attention_heads=6, num_key_value_heads=2, num_state_heads=3)

    def test_a_config_gives_the_shape(self) -> None:
        config = {
            name: getattr(SHAPE, name) for name in SHAPE.__slots__ if "bytes" not in name and name != "chunk_size"
        }
        assert MixerShape.from_config(config | {"model_type": "transmamba"}) == shape_with(chunk_size=64)
        del config["head_dim"]
        with pytest.raises(InputError, match="no head_dim"):
            MixerShape.from_config(config)


def test_importing_schedules_imports_no_torch() -> None:
    # Under the name of the command, the package does not register its models, which needs torch.
    code = (
        "import sys; sys.argv[0] = 'transmamba'; import transmamba.schedule; "
        "sys.exit(str({'torch', 'rich', 'matplotlib'} & set(sys.modules) or ''))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stderr.strip() == ""


def test_partway_goes_from_attention_to_the_schedule() -> None:
    schedule = TransPointSchedule([0, 16, 200, 256, None])
    assert schedule.partway(256, 0) == [None] * 5
    assert schedule.partway(256, 1) == [0, 16, 200, None, None]
    halfway = schedule.partway(256, 0.5)
    # P + 1 is the geometric mean: 257^0.5, (17 x 257)^0.5, (201 x 257)^0.5, each at the next of two lengths an octave.
    assert halfway == [16, 96, None, None, None]
    heights = [[256 if entry is None else entry for entry in schedule.partway(256, share / 20)] for share in range(21)]
    assert all(a >= b for one, other in pairwise(heights) for a, b in zip(one, other, strict=True))


def test_partway_takes_a_share_for_each_layer() -> None:
    assert TransPointSchedule([0, 0, 0]).partway(64, [0, 1, 0.5]) == [None, 0, 8]


@pytest.mark.parametrize("share", [-0.1, 1.1, [0.5], [0.5, 2.0]])
def test_partway_checks_its_share(share: Any) -> None:
    with pytest.raises(ScheduleError, match="must be a number from 0 to 1, or 2 of them"):
        TransPointSchedule([0, 8]).partway(64, share)
