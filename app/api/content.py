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
    """One content object as an input; `text` checks a text. Raises `InvalidRequest` naming `where`."""
    kind, value = _told(item, where)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}: {kind} must be a string", param=where)
    if kind == "text":
        return text(value, where)
    return Media(cast("MediaKind", kind), _source(kind, value, where))


def _told(item: Mapping[str, Any], where: str) -> tuple[str, Any]:
    """What kind of content, and the content."""
    form = item.get("type")
    if form is None:
        kinds = [kind for kind in ("text", "image", "video") if item.get(kind) is not None]
        if len(kinds) != 1:
            raise InvalidRequest(f"{where}: {_FORMS}", param=where)
        return kinds[0], item[kinds[0]]
    if form == "text":
        return "text", item.get("text")
    if form == "image_url":
        told = item.get("image_url")
        return "image", told.get("url") if isinstance(told, dict) else told
    raise InvalidRequest(f"{where}: {_FORMS}", param=where)


def _source(kind: str, value: str, where: str) -> str:
    """Checks an address or an image in a data URI. The gateway never fetches an address."""
    if value.lower().startswith(("http://", "https://")) and value.isprintable() and " " not in value:
        return value
    found = DATA_URI.match(value)
    if kind == "video" or found is None:
        forms = "an http(s) address" + ("" if kind == "video" else " or a data URI in base64")
        raise InvalidRequest(f"{where}: {kind} must be {forms}", param=where)
    try:
        if not pybase64.b64decode(value[found.end() :], validate=True):
            raise ValueError("empty")
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{where}: the data URI is not base64, or empty", param=where) from None
    return value
