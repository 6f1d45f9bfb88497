"""What pydantic found wrong, in the operator's words.

What a field takes is read off the model; what stood there instead is never shown.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, BeforeValidator, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from app.config.tree import Mistake, Path
from app.config.values import DURATIONS, SIZES, parse_duration, parse_size

_UNIONS = (Union, types.UnionType)
_LISTS = (tuple, list, set, frozenset)
_Place: TypeAlias = tuple[Any, Sequence[Any]]
"""A type, and what `Annotated` or `Field` adds to it."""


def explain(error: ValidationError, model: type[BaseModel], path: Path) -> list[Mistake]:
    """The mistakes of a section of this model at this path."""
    found = error.errors(include_url=False)
    # A list is also found too short when its items are refused.
    return [_explained(each, model, path) for each in found if each["type"] != "too_short" or not each["input"]]


def unknown_key(key: str, known: Iterable[str]) -> str:
    return f"unknown key{did_you_mean(key, known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean api_key?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _explained(details: ErrorDetails, model: type[BaseModel], path: Path) -> Mistake:
    kind, location = details["type"], details["loc"]
    if location[-1:] == ("[key]",) and kind != "extra_forbidden":  # which would be a key that is written so
        location = location[:-1]
    place, known = _walked(model, location)  # without what is no place in the file: a union's members
    if kind == "extra_forbidden":
        text = unknown_key(str(location[-1]), _fields(place))
        return Mistake((*path, *location), text, whatever_it_holds=True)
    if kind == "value_error":
        text = str(details["ctx"]["error"])
        field, colon, rest = text.partition(": ")
        if colon and field in _fields(place):  # a rule between fields that blames one of them
            return Mistake((*path, *known, field), rest)
    elif kind == "missing":
        text = _missing(place)
    else:
        text = _unfit(kind, details["input"], place)
    return Mistake((*path, *known), text)


def _fields(place: _Place) -> Collection[str]:
    inner, _ = _unwrapped(place)
    return inner.model_fields if _is_model(inner) else ()


def _missing(place: _Place) -> str:
    described = [item.description for item in place[1] if isinstance(item, FieldInfo) and item.description]
    return f"missing; set it to {described[0]}" if described else "missing; it must be set"


def _unfit(kind: str, value: Any, place: _Place) -> str:
    inner, _ = _unwrapped(place)
    if kind in ("string_too_short", "too_short") or (value == "" and inner in (str, SecretStr)):
        return "must not be empty"
    expected = _expected(place)
    if expected == "must be text" and isinstance(value, bool | int | float):
        return "must be text; put it in quotes"
    return expected


def _expected(place: _Place) -> str:
    """What may stand at a place."""
    inner, metadata = _unwrapped(place)
    readers = [item.func for item in metadata if isinstance(item, BeforeValidator)]
    if parse_duration in readers:
        return f"must be a duration{_bounds(metadata)}: {DURATIONS}"
    if parse_size in readers:
        return f"must be a size{_bounds(metadata)}: {SIZES}"
    if _generic(inner) is Literal:
        return f"must be one of {', '.join(str(choice) for choice in get_args(inner))}"
    if _is_model(inner) or _generic(inner) is dict:
        return "must be a mapping (key: value)"
    if _generic(inner) in _LISTS:
        return "must be a list"
    if _generic(inner) in _UNIONS:
        return "must be " + " or ".join(_expected((choice, ())).removeprefix("must be ") for choice in _choices(inner))
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    return f"must be {names.get(inner, 'text')}{_bounds(metadata)}"


def _bounds(metadata: Sequence[Any]) -> str:
    low = next((item.ge for item in metadata if isinstance(item, annotated_types.Ge)), None)
    high = next((item.le for item in metadata if isinstance(item, annotated_types.Le)), None)
    above = next((item.gt for item in metadata if isinstance(item, annotated_types.Gt)), None)
    if above is not None:
        return f" above {above}"
    if low is not None:
        return f", {low} or more" if high is None else f", {low} to {high}"
    return "" if high is None else f", at most {high}"


def _walked(model: type[BaseModel], path: Path) -> tuple[_Place, Path]:
    """The place at this path, as far as the model knows it; and that much of the path."""
    place: _Place = (model, ())
    for number, step in enumerate(path):
        below = _below(place, step)
        if below is None:
            return place, path[:number]
        place = below
    return place, path


def _below(place: _Place, step: str | int) -> _Place | None:
    inner, _ = _unwrapped(place)
    if _is_model(inner):
        field = inner.model_fields.get(step)
        return (field.annotation, [*field.metadata, field]) if field else None
    if _generic(inner) is dict:
        return get_args(inner)[1], ()
    if _generic(inner) in _LISTS:
        return get_args(inner)[0], ()
    return None


def _unwrapped(place: _Place) -> _Place:
    """Without `Annotated` and `| None`."""
    inner, metadata = place
    while True:
        if _generic(inner) is Annotated:
            inner, *more = get_args(inner)
            metadata = [*metadata, *(part for item in more for part in _parts(item))]
        elif _generic(inner) in _UNIONS:
            choices = _choices(inner)
            if len(choices) != 1:
                return inner, metadata
            inner = choices[0]
        else:
            return inner, metadata


def _choices(union: Any) -> list[Any]:
    return [choice for choice in get_args(union) if choice is not type(None)]


def _parts(item: Any) -> Sequence[Any]:
    return item.metadata if isinstance(item, FieldInfo) else (item,)


def _generic(annotation: Any) -> Any:
    """`dict` of `dict[str, int]`; None for what is not generic."""
    return get_origin(annotation)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
