"""The compressions that a reply's `content-encoding` names (RFC 9110 8.4), and how they are undone."""

from __future__ import annotations

import re
import zlib
from contextlib import suppress

_COMPRESSIONS = frozenset(("gzip", "x-gzip", "compress", "x-compress", "deflate", "br", "zstd"))
_WINDOW_BITS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}
"""How zlib numbers a compression's formats: some servers leave out the header of a deflated body (-15)."""

_PIECE = 2**12
"""Bytes decompressed at once, to 4 MiB at most: zlib joins what it gives while no other thread runs, and more would
hold up the event loop."""


def compressions(content_encoding: str) -> list[str]:
    """Those that were applied, in this order. Any other word counts as none: `identity`, or a charset or media type
    that was mistaken for a coding, as in `utf-8`."""
    return [word for word in re.split(r"[\s,]+", content_encoding.lower()) if word in _COMPRESSIONS]


def decompress(body: bytes | bytearray, applied: list[str], limit: int) -> bytearray:
    """The first `limit` bytes of what was compressed. Raises `ValueError` for a body that was compressed twice or with
    anything but gzip and deflate, or that is cut off or damaged."""
    for bits in _WINDOW_BITS.get(" ".join(applied), ()):
        with suppress(zlib.error):
            return _inflate(body, bits, limit)
    raise ValueError(f"cannot decompress {', '.join(applied)}")


def _inflate(body: bytes | bytearray, bits: int, limit: int) -> bytearray:
    plain = bytearray()
    decompressor = zlib.decompressobj(bits)
    with memoryview(body) as compressed:
        for start in range(0, len(compressed), _PIECE):
            plain += decompressor.decompress(compressed[start : start + _PIECE], limit - len(plain))
            if decompressor.eof or len(plain) == limit:
                return plain
    raise zlib.error("cut off")
