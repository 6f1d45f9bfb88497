"""Content objects of multimodal requests: `{"text"}`, `{"image"}`, `{"video"}`, and the parts OpenAI's clients send."""

from __future__ import annotations

import binascii
from collections.abc import Callable, Mapping
from typing import Any, cast

import pybase64

from app.catalog import MediaKind
from app.errors import InvalidRequest
from app.types import DATA_URI, Input, Media

_FORMS = 'a content object has exactly one of "text", "image", "video", or is a part of type text or image_url'


def parse(item: Mapping[str, Any], where: str, text: Callable[[str, str], str]) -> Input:
    """Converts a content object to an input; `text` validates a text. Raises `InvalidRequest` naming `where`."""
    kind, value = _kind_and_value(item, where)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}: {kind} must be a string", param=where)
    if kind == "text":
        return text(value, where)
    return Media(cast("MediaKind", kind), _source(kind, value, where))


def _kind_and_value(item: Mapping[str, Any], where: str) -> tuple[str, Any]:
    """The kind of content, and its value."""
    part_type = item.get("type")
    if part_type is None:
        kinds = [kind for kind in ("text", "image", "video") if item.get(kind) is not None]
        if len(kinds) != 1:
            raise InvalidRequest(f"{where}: {_FORMS}", param=where)
        return kinds[0], item[kinds[0]]
    if part_type == "text":
        return "text", item.get("text")
    if part_type == "image_url":
        image = item.get("image_url")
        return "image", image.get("url") if isinstance(image, dict) else image
    raise InvalidRequest(f"{where}: {_FORMS}", param=where)


def _source(kind: str, value: str, where: str) -> str:
    """Validates a URL, or an image in a data URI. The gateway never fetches a URL."""
    if value.lower().startswith(("http://", "https://")) and value.isprintable() and " " not in value:
        return value
    match = DATA_URI.match(value)
    if kind == "video" or match is None:
        forms = "an http(s) address" + ("" if kind == "video" else " or a data URI in base64")
        raise InvalidRequest(f"{where}: {kind} must be {forms}", param=where)
    try:
        if not pybase64.b64decode(value[match.end() :], validate=True):
            raise ValueError("empty")
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{where}: the data URI is not base64, or empty", param=where) from None
    return value
