"""The compressions that a `content-encoding` names (RFC 9110 8.4). Knows neither requests nor replies."""

from __future__ import annotations

import re

_COMPRESSIONS = frozenset(("gzip", "x-gzip", "compress", "x-compress", "deflate", "br", "zstd"))


def compressions(content_encoding: str) -> list[str]:
    """Those that were applied, in this order. Any other word counts as none: `identity`, or a charset or media type
    that was mistaken for a coding, as in `utf-8`."""
    return [word for word in re.split(r"[\s,]+", content_encoding.lower()) if word in _COMPRESSIONS]
