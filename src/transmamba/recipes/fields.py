"""Fields of nested dataclasses as text and JSON, checked against their annotations."""

import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from transmamba.errors import RecipeError

__all__ = ["field_types", "from_json", "with_fields"]

T = TypeVar("T")


def field_types(cls: type) -> dict[str, Any]:
    """The fields of a dataclass and of those inside it, "text.source" for one inside, each with its type."""
    return dict(_leaves(cls, ""))


def with_fields(instance: T, texts: Mapping[str, str]) -> T:
    """The dataclass with some fields, "learning_rate" or "text.source", set to what the texts say, all at once.

    Numbers are written as in Python, truth values as true or false, an absent value as none, several with commas.

    Raises:
        RecipeError: there is no such field, or a text is not of its type; whatever the dataclass itself refuses.
    """
    known = field_types(type(instance))
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"There is no field {name!r}.{hint} Known: {', '.join(sorted(known))}.")
        values[name] = _parse(name, text, known[name])
    return _replaced(instance, values)


def from_json(cls: type[T], content: Mapping[str, Any]) -> T:
    """The dataclass that was written as JSON's types with `dataclasses.asdict`.

    Raises:
        RecipeError: a field is unknown; whatever the dataclass itself refuses.
    """
    types_of = typing.get_type_hints(cls)
    unknown = sorted(set(content) - set(types_of))
    if unknown:
        raise RecipeError(f"{cls.__name__} has no field {unknown[0]!r}. Known: {', '.join(sorted(types_of))}.")
    values = {
        name: from_json(types_of[name], value) if is_dataclass(types_of[name]) else _as_tuple(value)
        for name, value in content.items()
    }
    return cls(**values)


def _leaves(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    types_of = typing.get_type_hints(cls)
    for field in fields(cls):
        kind = types_of[field.name]
        if is_dataclass(kind):
            yield from _leaves(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", kind


def _replaced(instance: Any, values: Mapping[str, Any]) -> Any:
    here = {name: value for name, value in values.items() if "." not in name}
    inside: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        first, dot, rest = name.partition(".")
        if dot:
            inside.setdefault(first, {})[rest] = value
    return replace(
        instance, **here, **{name: _replaced(getattr(instance, name), rest) for name, rest in inside.items()}
    )


def _parse(name: str, text: str, kind: Any) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    origins = [typing.get_origin(option) or option for option in options]
    if type(None) in origins and text.strip().lower() == "none":
        return None
    # Whole numbers before others; text takes anything, so a field that may be a text or a tuple reads a text.
    readers: tuple[tuple[type, Callable[[str], Any]], ...] = (
        (bool, _truth),
        (int, int),
        (float, float),
        (str, str),
        (tuple, _numbers),
    )
    for origin, read in readers:
        if origin in origins:
            try:
                return read(text)
            except ValueError:
                continue
    raise RecipeError(f"{name}={text!r} must be {' or '.join(_WORDS[origin] for origin in origins)}.")


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "numbers with commas between",
    type(None): "none",
}


def _truth(text: str) -> bool:
    words = {"true": True, "false": False}
    if text.strip().lower() not in words:
        raise ValueError(text)
    return words[text.strip().lower()]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
