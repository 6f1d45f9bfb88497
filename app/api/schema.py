"""Parses and validates OpenAI's embeddings request; errors are 400s that name the field.

orjson parses strictly: no NaN, no lone surrogates, at most 1,024 levels; the last of duplicate keys wins. Validation is
written by hand, so that an error names `input[7]` and says what would be valid, and a valid request costs a
microsecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import orjson
from msgspec import Struct

from app import tokens
from app.api import content
from app.catalog import ROLES
from app.errors import BodyTooLarge, InvalidJson, InvalidRequest, UnsupportedDimensions, lacks_memory
from app.types import MAX_DIMENSIONS, Input, Media, OnLongInput, OutputType, Params

MAX_IDS = 2**18
"""Token ids per input, at most: twice what the longest model takes, and decoded fast enough not to delay others."""

MAX_OBJECTS, MAX_OBJECTS_PER_INPUT = 2**18, 32
"""Strings (keys included), lists and objects in a body, at most: far more than any valid request needs."""

Encoding: TypeAlias = Literal["float", "base64"]
CHOICES: Mapping[str, tuple[str, ...]] = {
    "encoding_format": get_args(Encoding),
    "input_type": ROLES,
    "text_type": ROLES,
    "output_type": get_args(OutputType),
    "on_long_input": get_args(OnLongInput),
}
"""The values that a field allows."""

MAX_INSTRUCT_CHARACTERS = 4096
"""An instruction is a few sentences at most, and is sent with every call, or every text."""
_IN_PARAMS = frozenset(("dimensions", "input_type", "text_type", "output_type", "instruct"))
_DEFAULT_PARAMS = Params()


class EmbeddingsBody(Struct):
    """A validated request body. Token ids have been decoded to text."""

    model: str
    inputs: Sequence[Input]
    params: Params
    encoding: Encoding
    on_long_input: OnLongInput | None = None
    media: bool = False
    """Whether any input is not text."""
    decoded: int = 0
    """Bytes of text decoded from token ids."""


def parse_body(raw: bytes, *, max_inputs: int, max_decoded: int, path_model: str | None = None) -> EmbeddingsBody:
    """Parses and validates a body. `max_decoded` limits the bytes of text decoded from token ids. `path_model`, the
    model named in the path, takes precedence over the body's. Raises `InvalidRequest`, and `MemoryError`."""
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
    """Rejects a body that would take too much memory, before it is parsed: `[],` is 3 bytes, but 70 once parsed.
    Numbers, and so token ids, take up to 15 times their text and do not count. Raises `InvalidRequest`."""
    limit = MAX_OBJECTS + MAX_OBJECTS_PER_INPUT * max_inputs
    if raw.count(b'"') + raw.count(b"[") + raw.count(b"{") <= limit:
        return
    # Brackets within strings do not count, so strings, every second piece between quotes, are left out.
    plain = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    strings = plain.count(b'"') // 2
    if strings <= limit:
        outside = b"".join(plain.split(b'"')[::2])
        if strings + outside.count(b"[") + outside.count(b"{") <= limit:
            return
    raise InvalidRequest(f"the request body has more than {limit} strings, lists and objects")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _invalid_json(raw, error) from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"the request body must be a JSON object, not {_kind(body)}")
    return body


def _invalid_json(raw: bytes, error: orjson.JSONDecodeError) -> InvalidJson | MemoryError:
    detail = str(error)
    if lacks_memory(error):
        return MemoryError(detail)
    if "surrogates not allowed" in detail:  # orjson's message for any invalid UTF-8
        try:
            raw.decode()
        except UnicodeDecodeError as fault:
            detail = f"it is not UTF-8 at byte {fault.start}"
    code = "invalid_unicode" if "surrogate in string" in detail else None
    return InvalidJson(f"the request body is not valid JSON: {detail}", code=code)


def _params(body: dict[str, Any]) -> Params:
    if _IN_PARAMS.isdisjoint(body):
        return _DEFAULT_PARAMS
    role = _choice(body, "input_type")
    synonym = _choice(body, "text_type")
    if role and synonym and role != synonym:
        raise InvalidRequest("input_type and its synonym text_type differ; send one", param="text_type")
    instruct = body.get("instruct")
    if instruct is not None and not isinstance(instruct, str):
        raise InvalidRequest(f"instruct must be a string, not {_kind(instruct)}", param="instruct")
    if instruct is not None and len(instruct) > MAX_INSTRUCT_CHARACTERS:
        detail = f"instruct has {len(instruct)} characters; it may have {MAX_INSTRUCT_CHARACTERS}"
        raise InvalidRequest(detail, param="instruct")
    return Params(
        dimensions=_dimensions(body.get("dimensions")),
        input_type=role or synonym,
        output_type=_choice(body, "output_type", "dense"),
        instruct=instruct,
    )


def _dimensions(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < 1:  # bool is a subclass of int
        raise InvalidRequest(f"dimensions must be a whole number of at least 1, not {_kind(value)}", param="dimensions")
    if value > MAX_DIMENSIONS:
        raise UnsupportedDimensions(f"no model gives more than {MAX_DIMENSIONS} dimensions", param="dimensions")
    return value


def _choice(body: dict[str, Any], field: str, default: str | None = None) -> Any:
    """The field's value, one of its `CHOICES`; `default` if it is absent."""
    value = body.get(field)
    if value is None:
        return default
    choices = CHOICES[field]
    if value not in choices:
        shown = value[:40] if isinstance(value, str) else _kind(value)
        raise InvalidRequest(f"Invalid value for '{field}' = {shown}. Supported values: {list(choices)}.", param=field)
    return value


# --- input ----------------------------------------------------------------------------------------------


_Inputs = tuple[Sequence[Input], bool, int]
"""The inputs, whether any of them is not text, and the bytes of text decoded from token ids."""


def _inputs(value: Any, max_inputs: int, max_decoded: int) -> _Inputs:
    if isinstance(value, str):
        return (_text(value, "input"),), False, 0
    if value is None:
        raise InvalidRequest("you must provide input: a string, a list of strings, or token ids", param="input")
    if not isinstance(value, list):
        raise InvalidRequest(f"input must be a string or a list, not {_kind(value)}", param="input")
    if not value:
        raise InvalidRequest("input must not be an empty list", param="input")
    return _input_list(value, max_inputs, max_decoded)


def _input_list(value: list[Any], max_inputs: int, max_decoded: int) -> _Inputs:
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
        return _content_objects(value)
    raise _mixed_types_error(value)


def _content_objects(value: list[Any]) -> _Inputs:
    inputs = [
        _text(item, f"input[{i}]") if isinstance(item, str) else content.parse(item, f"input[{i}]", _text)
        for i, item in enumerate(value)
    ]
    return inputs, any(isinstance(item, Media) for item in inputs), 0


def _text(text: str, where: str) -> str:
    if not text:
        raise InvalidRequest(f"{where} must not be an empty string", param=where)
    return text


def _tokens(ids: list[Any], where: str, before: int, limit: int) -> str:
    """Decodes token ids to text, at most `limit` bytes including the `before` bytes of the inputs before it: an id of
    five digits may stand for 128 bytes."""
    if not ids:
        raise InvalidRequest(f"{where} must not be an empty list of token ids", param=where)
    if len(ids) > MAX_IDS:
        raise InvalidRequest(f"{where} has {len(ids)} token ids; at most {MAX_IDS} are allowed", param=where)
    if set(map(type, ids)) != {int}:
        raise InvalidRequest(f"{where} must hold token ids only, whole numbers", param=where)
    try:
        return tokens.decode(ids, limit - before)
    except OverflowError:
        detail = (
            f"the token ids of one request may stand for {limit} bytes of text, and up to {where} they stand for more"
        )
        raise BodyTooLarge(detail, param=where) from None
    except IndexError as error:
        position = error.args[0]
        # Special tokens have ids too (<|endoftext|> is 100257), but no bytes in the table.
        detail = f"{where} holds {ids[position]} at position {position}, which is no cl100k_base token id of any text"
        raise InvalidRequest(detail, param=where) from None


def _mixed_types_error(value: list[Any]) -> InvalidRequest:
    """The error for a list that is neither all strings nor all lists of ids. It names the first item of a type that is
    never allowed, or else the first whose type differs from the first item's."""
    for i, item in enumerate(value):
        if type(item) not in (str, list, int, dict):
            where = f"input[{i}]"
            return InvalidRequest(f"{where} must be a string or a list of token ids, not {_kind(item)}", param=where)
    i, item = next((i, item) for i, item in enumerate(value) if type(item) is not type(value[0]))
    where = f"input[{i}]"
    return InvalidRequest(f"{where} is {_kind(item)} among items of another kind; send one kind", param=where)


def _kind(value: Any) -> str:
    """Names a JSON value's type in plain words. Of values, which may be of any size, only small numbers are shown."""
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
