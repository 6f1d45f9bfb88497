"""What a request's headers say that is not the framework's to read."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

Lines: TypeAlias = Iterable[tuple[bytes, bytes]]
"""Headers as they came, names in lower case; one name may be there several times."""

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_PLAIN = frozenset((b"", b"identity"))
"""Codings that leave a body as it is; a list may have empty members (RFC 9110 5.6.1)."""


def request_id(headers: Mapping[bytes, bytes]) -> bytes:
    """The caller's own `x-request-id` if it is one (printable, up to 128 bytes), else a new one."""
    own = headers.get(b"x-request-id")
    if own is not None and _REQUEST_ID.fullmatch(own):
        return own
    return b"req_%024x" % random.getrandbits(96)  # to tell requests apart; it opens nothing


def content_length(headers: Mapping[bytes, bytes]) -> int:
    """Bytes of the body by its `content-content_length`; 0 where it comes in chunks."""
    # Python reads no number of more than 4,300 digits; the parser none of 2**64 or more, but zeros before any.
    told = headers.get(b"content-length", b"").lstrip(b"0")
    return int(told) if told.isdigit() else 0


def is_compressed(headers: Mapping[bytes, bytes], lines: Lines) -> bool:
    """Whether the body is compressed, as such or for its transfer. `headers`: the `lines` by name, of several the
    last."""
    if b"content-encoding" in headers and not _members(lines, b"content-encoding") <= _PLAIN:
        return True
    # The server has seen to it that the last of the codings is `chunked`.
    return b"transfer-encoding" in headers and not _members(lines, b"transfer-encoding") <= _PLAIN | {b"chunked"}


def cache_control(lines: Lines) -> tuple[bool, bool]:
    """(read the cache, write the cache), by `Cache-Control`."""
    directives = _members(lines, b"cache-control")
    return b"no-cache" not in directives, b"no-store" not in directives


def _members(lines: Lines, name: bytes) -> set[bytes]:
    """What the header of this name lists, in lower case: several lines count as one."""
    values = [value for each, value in lines if each == name]
    return {part.strip().lower() for part in b",".join(values).split(b",")}
