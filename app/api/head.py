"""The request headers that the gateway reads itself, without the framework."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

Lines: TypeAlias = Iterable[tuple[bytes, bytes]]
"""Headers in the order received, names in lower case; a name may repeat."""

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_UNENCODED = frozenset((b"", b"identity"))
"""Codings that leave a body unchanged; a list may have empty elements (RFC 9110 5.6.1)."""
_CHARSETS = frozenset((b"utf-8", b"utf8"))
"""What some clients write where a content coding belongs."""


def by_name(lines: Lines) -> dict[bytes, bytes]:
    """The headers by name; of a repeated one, the last. An empty one counts as absent."""
    return {name: value for name, value in lines if value}


def request_id(headers: Mapping[bytes, bytes]) -> bytes:
    """The caller's `x-request-id` if it is valid (printable, up to 128 bytes), else a new one."""
    own = headers.get(b"x-request-id")
    if own is not None and _REQUEST_ID.fullmatch(own):
        return own
    return b"req_%024x" % random.getrandbits(96)  # need only be unique, not secret


def content_length(headers: Mapping[bytes, bytes]) -> int:
    """The `content-length` in bytes; 0 for a chunked body."""
    # int() refuses more than 4,300 digits. The parser refuses 2**64 and more, but allows any number of leading zeros.
    digits = headers.get(b"content-length", b"").lstrip(b"0")
    return int(digits) if digits.isdigit() else 0


def is_compressed(headers: Mapping[bytes, bytes], lines: Lines) -> bool:
    """Whether a content or transfer coding compresses the body. `headers`: the `lines` `by_name`."""
    if b"content-encoding" in headers and not _elements(lines, b"content-encoding") <= _UNENCODED | _CHARSETS:
        return True
    # The server has already checked that the last coding is `chunked`.
    return b"transfer-encoding" in headers and not _elements(lines, b"transfer-encoding") <= _UNENCODED | {b"chunked"}


def is_json(headers: Mapping[bytes, bytes]) -> bool:
    """Whether the body is declared as JSON. A browser sends such a body to another site than the page's own only if
    that site allows it, which this one never does (Fetch standard, "CORS-safelisted request-header")."""
    return headers.get(b"content-type", b"").partition(b";")[0].strip().lower() == b"application/json"


def cache_control(lines: Lines) -> tuple[bool, bool]:
    """(read the cache, write the cache), according to `Cache-Control`."""
    directives = _elements(lines, b"cache-control")
    return b"no-cache" not in directives, b"no-store" not in directives


def _elements(lines: Lines, name: bytes) -> set[bytes]:
    """The elements of the list in this header, in lower case; repeated headers form one list."""
    values = [value for header, value in lines if header == name]
    return {part.strip().lower() for part in b",".join(values).split(b",")}
