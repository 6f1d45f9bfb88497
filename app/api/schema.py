"""OpenAI's embeddings request: raw body to what was asked for, or a 400 that names the field.

orjson parses, strictly (no NaN, no lone surrogates, at most 1,024 levels; of duplicate keys the last
wins). Checking is by hand: a refusal then names `input[7]` and says what would be right, and a good
request costs a microsecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import orjson
from msgspec import Struct

from app import tokens
from app.api import content
from app.catalog import ROLES
from app.errors import BodyTooLarge, InvalidJson, InvalidRequest, UnsupportedDimensions
from app.types import MAX_DIMENSIONS, Input, Media, OnLongInput, OutputType, Params

MAX_IDS = 2**18
"""Token ids of one input, at most: twice what the longest model takes, and decoded fast enough to hold up nobody."""

OBJECTS, OBJECTS_PER_INPUT = 2**18, 32
"""Strings, keys among them, lists and objects of a body, at most: far more than any request that is taken needs."""

Encoding: TypeAlias = Literal["float", "base64"]
CHOICES: Mapping[str, tuple[str, ...]] = {
    "encoding_format": get_args(Encoding),
    "input_type": ROLES,
    "text_type": ROLES,
    "output_type": get_args(OutputType),
    "on_long_input": get_args(OnLongInput),
}
"""The words that may stand in a field."""

MAX_INSTRUCT_CHARACTERS = 4096
"""Characters. An instruction is a sentence or a few, and goes with every call, or every text."""
_IN_PARAMS = frozenset(("dimensions", "input_type", "text_type", "output_type", "instruct"))
_USUAL = Params()


class EmbeddingsBody(Struct):
    """A request body, checked. Token ids are text by now."""

    model: str
    inputs: Sequence[Input]
    params: Params
    encoding: Encoding
    on_long_input: OnLongInput | None = None
    media: bool = False
    """Whether any of the inputs is no text."""
    decoded: int = 0
    """Bytes of text that came as token ids."""


def parse_body(raw: bytes, *, max_inputs: int, max_decoded: int, path_model: str | None = None) -> EmbeddingsBody:
    """Raises `InvalidRequest`. `max_decoded`: bytes of text that token ids may come to. `path_model` is the model named
    by the route, which then decides."""
    body = _object(raw)
    model = path_model if path_model is not None else body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("you must provide a model parameter: the name of a model, a string", param="model")
    try:
        encoding = _choice(body, "encoding_format", "float")
        inputs, media, decoded = _inputs(body.get("input"), max_inputs, max_decoded)
        user = body.get("user")
        if user is not None and not isinstance(user, str):
            raise InvalidRequest(f"user must be a string, not {_kind(user)}", param="user")
        return EmbeddingsBody(model, inputs, _params(body), encoding, _choice(body, "on_long_input"), media, decoded)
    except InvalidRequest as error:
        error.model = model
        raise


def check_object_count(raw: bytes, *, max_inputs: int) -> None:
    """Refuses a body that would take too much memory, before it is parsed: `[],` has 3 bytes, and takes 70 once it is
    parsed. Numbers, of which token ids are made, take up to 15 times their text and do not count. Raises
    `InvalidRequest`."""
    most = OBJECTS + OBJECTS_PER_INPUT * max_inputs
    if raw.count(b'"') + raw.count(b"[") + raw.count(b"{") <= most:
        return
    # Brackets within texts do not count, so texts are left out: every second piece between quotes.
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = plain.count(b'"') // 2
    if strings <= most:
        outside = b"".join(plain.split(b'"')[::2])
        if strings + outside.count(b"[") + outside.count(b"{") <= most:
            return
    raise InvalidRequest(f"the request body has more than {most} strings, lists and objects")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _no_json(raw, error) from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"the request body must be a JSON object, not {_kind(body)}")
    return body


def _no_json(raw: bytes, error: orjson.JSONDecodeError) -> InvalidJson:
    told = str(error)
    if "surrogates not allowed" in told:  # what orjson says of any byte that is not UTF-8
        try:
            raw.decode()
        except UnicodeDecodeError as fault:
            told = f"it is not UTF-8 at byte {fault.start}"
    code = "invalid_unicode" if "surrogate in string" in told else None
    return InvalidJson(f"the request body is not valid JSON: {told}", code=code)


def _params(body: dict[str, Any]) -> Params:
    if _IN_PARAMS.isdisjoint(body):
        return _USUAL
    role = _choice(body, "input_type")
    synonym = _choice(body, "text_type")
    if role and synonym and role != synonym:
        raise InvalidRequest("input_type and its synonym text_type differ; send one", param="text_type")
    instruct = body.get("instruct")
    if instruct is not None and not isinstance(instruct, str):
        raise InvalidRequest(f"instruct must be a string, not {_kind(instruct)}", param="instruct")
    if instruct is not None and len(instruct) > MAX_INSTRUCT_CHARACTERS:
        told = f"instruct has {len(instruct)} characters; it may have {MAX_INSTRUCT_CHARACTERS}"
        raise InvalidRequest(told, param="instruct")
    return Params(
        dimensions=_dimensions(body.get("dimensions")),
        input_type=role or synonym,
        output_type=_choice(body, "output_type", "dense"),
        instruct=instruct,
    )


def _dimensions(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 1:  # bool is an int to Python
        raise InvalidRequest(f"dimensions must be a whole number of at least 1, not {_kind(value)}", param="dimensions")
    if value > MAX_DIMENSIONS:
        raise UnsupportedDimensions(f"no model gives more than {MAX_DIMENSIONS} dimensions", param="dimensions")
    return value


def _choice(body: dict[str, Any], field: str, usual: str | None = None) -> Any:
    """The field's value, one of its `CHOICES`; `usual` where it is absent."""
    value = body.get(field)
    if value is None:
        return usual
    choices = CHOICES[field]
    if value not in choices:
        shown = value[:40] if isinstance(value, str) else _kind(value)
        raise InvalidRequest(f"Invalid value for '{field}' = {shown}. Supported values: {list(choices)}.", param=field)
    return value


# --- input ----------------------------------------------------------------------------------------------


_Inputs = tuple[Sequence[Input], bool, int]
"""The inputs, whether any of them is no text, and bytes of text that came as token ids."""


def _inputs(value: Any, max_inputs: int, max_decoded: int) -> _Inputs:
    if isinstance(value, str):
        return (_text(value, "input"),), False, 0
    if value is None:
        raise InvalidRequest("you must provide input: a string, a list of strings, or token ids", param="input")
    if not isinstance(value, list):
        raise InvalidRequest(f"input must be a string or a list, not {_kind(value)}", param="input")
    if not value:
        raise InvalidRequest("input must not be an empty list", param="input")
    return _listed(value, max_inputs, max_decoded)


def _listed(value: list[Any], max_inputs: int, max_decoded: int) -> _Inputs:
    kinds = set(map(type, value))
    if kinds == {int}:
        text = _tokens(value, "input", 0, max_decoded)
        return (text,), False, tokens.upper_bound(text)
    if len(value) > max_inputs:
        raise InvalidRequest(f"input has {len(value)} items; at most {max_inputs} are allowed", param="input")
    if kinds == {str}:
        if "" in value:
            _text("", f"input[{value.index('')}]")
        return value, False, 0
    if kinds == {list}:
        texts, decoded = [], 0
        for i, ids in enumerate(value):
            texts.append(_tokens(ids, f"input[{i}]", decoded, max_decoded))
            decoded += tokens.upper_bound(texts[-1])
        return texts, False, decoded
    if kinds <= {str, dict}:
        return _contents(value)
    raise _mixed(value)


def _contents(value: list[Any]) -> _Inputs:
    inputs = [
        _text(item, f"input[{i}]") if isinstance(item, str) else content.parse(item, f"input[{i}]", _text)
        for i, item in enumerate(value)
    ]
    return inputs, any(isinstance(each, Media) for each in inputs), 0


def _text(text: str, where: str) -> str:
    if not text:
        raise InvalidRequest(f"{where} must not be an empty string", param=where)
    return text


def _tokens(ids: list[Any], where: str, before: int, most: int) -> str:
    """The ids' text. With the `before` bytes of the inputs before it, it may have `most`: an id of five digits may
    stand for 128 bytes."""
    if not ids:
        raise InvalidRequest(f"{where} must not be an empty list of token ids", param=where)
    if len(ids) > MAX_IDS:
        raise InvalidRequest(f"{where} has {len(ids)} token ids; at most {MAX_IDS} are allowed", param=where)
    if set(map(type, ids)) != {int}:
        raise InvalidRequest(f"{where} must hold token ids only, whole numbers", param=where)
    try:
        return tokens.decode(ids, most - before)
    except OverflowError:
        told = f"the token ids of one request may stand for {most} bytes of text, and up to {where} they stand for more"
        raise BodyTooLarge(told, param=where) from None
    except IndexError as error:
        position = error.args[0]
        raise InvalidRequest(
            f"{where} holds {ids[position]} at position {position}, which is no cl100k_base token id", param=where
        ) from None


def _mixed(value: list[Any]) -> InvalidRequest:
    """What is wrong with a list that is neither all strings nor all lists of ids: its first item of a kind that is
    never allowed, or else its first of another kind than its first item."""
    first = type(value[0])
    never = (i for i, item in enumerate(value) if type(item) not in (str, list, int, dict))
    odd = next(never, None)
    if odd is None:
        odd = next(i for i, item in enumerate(value) if type(item) is not first)
    item = value[odd]
    where = f"input[{odd}]"
    if type(item) in (str, list, int, dict):
        return InvalidRequest(f"{where} is {_kind(item)} among others of another kind; send one kind", param=where)
    return InvalidRequest(f"{where} must be a string or a list of token ids, not {_kind(item)}", param=where)


def _kind(value: Any) -> str:
    """A JSON value's kind in a reader's words; never the value, which may be anything and any size."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number" if abs(value) > 10**9 else f"{value}"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"
