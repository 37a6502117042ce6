"""The table of a conversion: complete, without overlap, and strict about what does not fit."""

import json

import pytest

from tests.conversion.checkpoints import tiny_source
from transmamba.conversion import IgnoredTensor, plan_conversion
from transmamba.conversion.plan import Move, Part, check_moves
from transmamba.errors import CheckpointError

MOVES = [
    Move(source="whole", target="a"),
    Move(source="fused", target="b", transform="transpose", part=Part(dim=1, start=0, stop=4)),
    Move(source="fused", target="c", transform="transpose", part=Part(dim=1, start=4, stop=6)),
]
SOURCE = {"whole": (5,), "fused": (3, 6), "mask": (9, 9)}
TARGET = {"c": (2, 3), "a": (5,), "b": (4, 3)}
IGNORED = [IgnoredTensor(source="mask", shape=(9, 9), reason="no parameter")]


def test_rows_are_in_the_order_of_the_student() -> None:
    rows = check_moves("it", MOVES, IGNORED, SOURCE, TARGET)
    assert [(row.target, row.source, row.kind, row.shape) for row in rows] == [
        ("c", "fused", "sliced", (2, 3)),
        ("a", "whole", "copied", (5,)),
        ("b", "fused", "sliced", (4, 3)),
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"fused": (3, 6), "mask": (9, 9)}, "it lacks whole, which its config.json asks for"),
        ({"mask": (9, 9)}, "it lacks fused and 1 more"),
        (SOURCE | {"adapter.weight": (1,)}, "it has adapter.weight, which has no place in the student"),
        (SOURCE | {"whole": (7,)}, r"whole has shape \(7,\), which gives \(7,\) for a; config.json asks for \(5,\)"),
        (SOURCE | {"fused": (3, 7)}, r"fused has shape \(3, 7\); its dimension 1 should be 6"),
        (SOURCE | {"fused": (3,)}, r"fused has shape \(3,\)"),
        (SOURCE | {"fused": (2, 6)}, r"which gives \(4, 2\) for b"),
    ],
)
def test_a_source_that_does_not_fit_is_refused_by_name(source: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_moves("it", MOVES, IGNORED, source, TARGET)


@pytest.mark.parametrize(
    "moves",
    [
        [*MOVES, Move(source="whole", target="a")],
        [*MOVES[:2], Move(source="fused", target="c", part=Part(dim=1, start=3, stop=6))],
        [*MOVES[:2], Move(source="fused", target="c", part=Part(dim=1, start=5, stop=6))],
        [MOVES[0], MOVES[2]],
        [*MOVES, Move(source="fused", target="d")],
        [*MOVES, Move(source="mask", target="d")],
    ],
    ids=["two sources", "overlap", "gap", "beginning left out", "whole and parts", "used and ignored"],
)
def test_a_table_of_ours_that_is_wrong_is_seen(moves: list[Move]) -> None:
    with pytest.raises(AssertionError):
        check_moves("it", moves, IGNORED, SOURCE, TARGET | {"d": (3, 6)})


def test_a_plan_is_json() -> None:
    plan = plan_conversion(tiny_source("GPT-2"), schedule=[0, 7, None])
    content = json.loads(plan.to_json())
    assert content["family"] == "gpt2"
    assert content["trans_points"] == [0, 7, None]
    assert [row["target"] for row in content["parameters"]] == [row.target for row in plan]
    v = next(row for row in content["parameters"] if row["target"] == "model.layers.0.mixer.v_proj.bias")
    assert v["part"] == {"dim": 0, "start": 64, "stop": 96}
    assert {row["kind"] for row in content["parameters"]} == {"copied", "sliced", "fresh"}
