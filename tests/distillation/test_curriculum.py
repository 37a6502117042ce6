"""Where TransPoints are at each step."""

from itertools import pairwise

import pytest

from transmamba.distillation import TransPointCurriculum
from transmamba.errors import RecipeError
from transmamba.schedule import TransPointSchedule

TARGET = TransPointSchedule([0, 16, 64, None])
SEQ_LEN = 256


def schedules(curriculum: TransPointCurriculum, steps: int = 40, seed: int = 0) -> list[TransPointSchedule]:
    return [curriculum.schedule_at(step, steps, TARGET, SEQ_LEN, seed=seed) for step in range(steps)]


def test_without_a_descent_every_step_is_at_the_target() -> None:
    assert set(schedules(TransPointCurriculum())) == {TARGET}


@pytest.mark.parametrize(("shares", "moves"), [({}, False), ({"descent": 0.1}, True), ({"freedom": 0.1}, True)])
def test_a_curriculum_says_whether_it_moves(shares: dict[str, float], moves: bool) -> None:
    assert TransPointCurriculum(**shares).moves == moves


def test_trans_points_come_down_and_arrive() -> None:
    found = schedules(TransPointCurriculum(descent=0.5))
    heights = [[SEQ_LEN if entry is None else entry for entry in schedule] for schedule in found]
    assert all(a >= b for one, other in pairwise(heights) for a, b in zip(one, other, strict=True))
    assert heights[0][0] > SEQ_LEN / 2
    assert found[19] != TARGET
    assert set(found[20:]) == {TARGET}


def test_freedom_moves_layers_up_and_apart_in_its_share_of_the_steps() -> None:
    found = schedules(TransPointCurriculum(freedom=0.3), steps=400)
    free = [schedule for schedule in found if schedule != TARGET]
    # A binomial share of 400 steps at 0.3 has a standard deviation of 0.023.
    assert abs(len(free) / 400 - 0.3) < 4 * 0.023
    assert all(
        new is None or new >= old for schedule in free for old, new in zip(TARGET[:3], schedule[:3], strict=True)
    )
    assert all(schedule[3] is None for schedule in free)
    assert len({schedule[0] for schedule in free}) > 10


def test_a_step_depends_on_its_number_and_the_seed_alone() -> None:
    curriculum = TransPointCurriculum(descent=0.4, freedom=0.5)
    assert schedules(curriculum) == schedules(curriculum)
    assert schedules(curriculum) != schedules(curriculum, seed=1)


@pytest.mark.parametrize(("name", "value"), [("descent", 1.5), ("freedom", -0.1)])
def test_shares_are_checked(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"{name}={value} must be between 0 and 1"):
        TransPointCurriculum(**{name: value})
