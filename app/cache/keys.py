"""Cache keys: a full-length hash over everything that may alter a vector, and nothing else.

Must not know the public model's name, the caller's key or `user`: equal vectors share one entry, whoever the caller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import pybase64

from app.types import DATA_URI, Input, Media, Params

_FORMAT = b"embedding-gateway key 2\n"
"""The common prefix of every hashed key. Change it whenever this module's format changes."""


def _field(value: object) -> bytes:
    """One value, tagged with its type and prefixed with its length, so that no two lists of values encode alike.

    Raises `TypeError` for a type without a tag: a new kind of parameter needs a decision here.
    """
    match value:
        case None:
            tag, raw = b"n", b""
        case bool():
            tag, raw = b"b", b"%d" % value
        case int():
            tag, raw = b"i", b"%d" % value
        case str():
            tag, raw = b"s", value.encode()
        case bytes():
            tag, raw = b"y", value
        case _:
            raise TypeError(f"no cache key for a {type(value).__name__}")
    return tag + len(raw).to_bytes(8, "big") + raw


# Taken from the class, so that a parameter added later is part of the key from the start.
_PARAMS = tuple((name, _field(name)) for name in Params.__struct_fields__)


def _common(space: str, params: Params, namespace: str) -> bytes:
    parts = [_FORMAT, _field(space), _field(namespace)]
    for name, tagged in _PARAMS:
        parts += tagged, _field(getattr(params, name))
    return hashlib.sha256(b"".join(parts)).digest()


_cached_common = lru_cache(maxsize=1024)(_common)


def derive(space: str, params: Params, inputs: Sequence[Input], namespace: str = "") -> list[bytes]:
    """One key per input, in input order: a whole SHA-256, never shortened.

    `space` identifies the vector space (vendor, model, revision); `namespace` separates a caller's entries from
    everyone else's. Raises `TypeError` for a parameter of an unknown type and `UnicodeEncodeError` for a lone
    surrogate, which the API refuses.
    """
    # What all inputs share is hashed once; that digest, whose length is fixed, precedes each input. Instructions are
    # free text of any size, so digests over them are not cached.
    common = (_cached_common if params.instruct is None else _common)(space, params, namespace)
    text, media, sha256 = common + b"text", common + b"media", hashlib.sha256
    return [
        sha256(text + item.encode() if type(item) is str else media + b"".join(map(_field, _media(item)))).digest()
        for item in inputs
    ]


def _media(media: Input) -> tuple[str | bytes, ...]:
    """What identifies an image or a video: its address, or its type and decoded bytes, however they were encoded."""
    assert isinstance(media, Media)
    match = DATA_URI.match(media.source)
    if match is None:
        return media.kind, "address", media.source
    return media.kind, match["type"].lower(), pybase64.b64decode(media.source[match.end() :])
