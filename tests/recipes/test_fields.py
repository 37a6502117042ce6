"""Fields as text and as JSON."""

from dataclasses import dataclass

import pytest

from transmamba.errors import RecipeError
from transmamba.recipes.fields import field_types, from_json, with_fields


@dataclass(frozen=True, kw_only=True)
class Inner:
    share: float = 0.5
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    steps: int | None = 10
    rate: float = 1e-3
    tied: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: str | tuple[int | None, ...] = "v9"

    def __post_init__(self) -> None:
        if self.steps is None and self.rate > 1:
            raise RecipeError("refused")


def test_fields_inside_are_named_with_a_dot() -> None:
    assert list(field_types(Outer)) == ["inner.share", "inner.name", "steps", "rate", "tied", "betas", "schedule"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "25", 25),
        ("steps", "none", None),
        ("rate", "1e-4", 1e-4),
        ("rate", "2", 2.0),
        ("tied", "false", False),
        ("tied", "True", True),
        ("betas", "0.8,0.99", (0.8, 0.99)),
        ("schedule", "0,128,none", "0,128,none"),
        ("inner.share", "0.25", 0.25),
        ("inner.name", "none", None),
        ("inner.name", "a=b", "a=b"),
    ],
)
def test_texts_become_values_of_the_field_s_type(name: str, text: str, value: object) -> None:
    changed = with_fields(Outer(), {name: text})
    for part in name.split("."):
        changed = getattr(changed, part)
    assert changed == value
    assert type(changed) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "2.5", r"steps='2\.5' must be a whole number or none\."),
        ("rate", "fast", r"rate='fast' must be a number\."),
        ("rate", "none", r"rate='none' must be a number\."),
        ("tied", "1", r"tied='1' must be true or false\."),
        ("betas", "a,b", r"betas='a,b' must be numbers with commas between\."),
        ("step", "1", r"no field 'step'\. Did you mean 'steps'\? Known: betas, inner\.name, inner\.share, rate"),
        ("inner", "1", "no field 'inner'"),
    ],
)
def test_what_a_field_cannot_take_is_named(name: str, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        with_fields(Outer(), {name: text})


def test_fields_are_changed_at_once() -> None:
    changed = with_fields(Outer(rate=2), {"rate": "0.5", "steps": "none", "inner.share": "0", "inner.name": "x"})
    assert changed == Outer(rate=0.5, steps=None, inner=Inner(share=0, name="x"))
    with pytest.raises(RecipeError, match="refused"):
        with_fields(Outer(rate=2), {"steps": "none"})


def test_json_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"Inner has no field 'shares'\. Known: name, share"):
        from_json(Outer, {"inner": {"shares": 1}})
