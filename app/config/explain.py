"""Turns pydantic's errors into messages for the operator.

What a field accepts is read from the model; the value found instead is never shown.
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
_Annotation: TypeAlias = tuple[Any, Sequence[Any]]
"""A type, and the metadata that `Annotated` or `Field` adds to it."""


def explain(error: ValidationError, model: type[BaseModel], path: Path) -> list[Mistake]:
    """The mistakes in the section at `path`, whose model is `model`."""
    errors = error.errors(include_url=False)
    # pydantic also reports a list as too short when its items are refused.
    return [_explain_one(item, model, path) for item in errors if item["type"] != "too_short" or not item["input"]]


def unknown_key(key: str, known: Iterable[str]) -> str:
    return f"unknown key{did_you_mean(key, known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean api_key?`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _explain_one(details: ErrorDetails, model: type[BaseModel], path: Path) -> Mistake:
    kind, location = details["type"], details["loc"]
    if location[-1:] == ("[key]",) and kind != "extra_forbidden":  # there, "[key]" is a key in the file
        location = location[:-1]
    annotation, known = _resolve(model, location)  # drops steps that are not in the file: a union's members
    if kind == "extra_forbidden":
        text = unknown_key(str(location[-1]), _fields(annotation))
        return Mistake((*path, *location), text, whatever_it_holds=True)
    if kind == "value_error":
        text = str(details["ctx"]["error"])
        field, colon, rest = text.partition(": ")
        if colon and field in _fields(annotation):  # a rule across fields that blames one of them
            return Mistake((*path, *known, field), rest)
    elif kind == "missing":
        text = _missing(annotation)
    else:
        text = _invalid(kind, details["input"], annotation)
    return Mistake((*path, *known), text)


def _fields(annotation: _Annotation) -> Collection[str]:
    inner, _ = _unwrapped(annotation)
    return inner.model_fields if _is_model(inner) else ()


def _missing(annotation: _Annotation) -> str:
    described = [item.description for item in annotation[1] if isinstance(item, FieldInfo) and item.description]
    return f"missing; set it to {described[0]}" if described else "missing; it must be set"


def _invalid(kind: str, value: Any, annotation: _Annotation) -> str:
    inner, _ = _unwrapped(annotation)
    if kind in ("string_too_short", "too_short") or (value == "" and inner in (str, SecretStr)):
        return "must not be empty"
    expected = _expected(annotation)
    if expected == "must be text" and isinstance(value, bool | int | float):
        return "must be text; put it in quotes"
    return expected


def _expected(annotation: _Annotation) -> str:
    """Describes what the annotation accepts."""
    inner, metadata = _unwrapped(annotation)
    parsers = [item.func for item in metadata if isinstance(item, BeforeValidator)]
    if parse_duration in parsers:
        return f"must be a duration{_bounds(metadata)}: {DURATIONS}"
    if parse_size in parsers:
        return f"must be a size{_bounds(metadata)}: {SIZES}"
    if _origin(inner) is Literal:
        return f"must be one of {', '.join(str(choice) for choice in get_args(inner))}"
    if _is_model(inner) or _origin(inner) is dict:
        return "must be a mapping (key: value)"
    if _origin(inner) in _LISTS:
        return "must be a list"
    if _origin(inner) in _UNIONS:
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


def _resolve(model: type[BaseModel], path: Path) -> tuple[_Annotation, Path]:
    """The annotation at `path`, followed as far as the model knows it, and that much of the path."""
    annotation: _Annotation = (model, ())
    for depth, step in enumerate(path):
        child = _child(annotation, step)
        if child is None:
            return annotation, path[:depth]
        annotation = child
    return annotation, path


def _child(annotation: _Annotation, step: str | int) -> _Annotation | None:
    inner, _ = _unwrapped(annotation)
    if _is_model(inner):
        field = inner.model_fields.get(step)
        return (field.annotation, [*field.metadata, field]) if field else None
    if _origin(inner) is dict:
        return get_args(inner)[1], ()
    if _origin(inner) in _LISTS:
        return get_args(inner)[0], ()
    return None


def _unwrapped(annotation: _Annotation) -> _Annotation:
    """Strips `Annotated` and `| None`."""
    inner, metadata = annotation
    while True:
        if _origin(inner) is Annotated:
            inner, *more = get_args(inner)
            metadata = [*metadata, *(part for item in more for part in _flatten(item))]
        elif _origin(inner) in _UNIONS:
            choices = _choices(inner)
            if len(choices) != 1:
                return inner, metadata
            inner = choices[0]
        else:
            return inner, metadata


def _choices(union: Any) -> list[Any]:
    return [choice for choice in get_args(union) if choice is not type(None)]


def _flatten(item: Any) -> Sequence[Any]:
    return item.metadata if isinstance(item, FieldInfo) else (item,)


def _origin(hint: Any) -> Any:
    """`dict` for `dict[str, int]`; None if the type hint is not generic."""
    return get_origin(hint)


def _is_model(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)
