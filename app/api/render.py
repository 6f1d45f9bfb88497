"""Renders results and errors to response bytes, straight from float32: no response model, no list of floats."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from email.utils import formatdate
from functools import lru_cache
from urllib.parse import quote

import orjson

from app import vectors
from app.api.usage import Usage
from app.errors import GatewayError, Overloaded, RateLimited
from app.pipeline.quota import LimitStatus
from app.types import EmbedResult

Header = tuple[bytes, bytes]

VECTORS_PER_TURN = {"float": 64, "base64": 512}
"""Vectors rendered before yielding to the event loop. 64 of 1,024 numbers each take 2 ms."""


_QUOTE = {"float": b"", "base64": b'"'}
"""What encloses a vector."""


def _separator(index: int, encoding: str, extra: bytes = b"") -> bytes:
    """The JSON between the previous vector and this one, including their quotes. `extra`: further members of this
    vector's object, each followed by a comma."""
    end = _QUOTE[encoding] + b"}," if index else b""
    return b'%b{"object":"embedding","index":%d,%b"embedding":%b' % (end, index, extra, _QUOTE[encoding])


_SEPARATORS = {encoding: tuple(_separator(index, encoding) for index in range(2048)) for encoding in VECTORS_PER_TURN}
"""Precomputed, because formatting an index takes longer than looking it up."""


async def embeddings(result: EmbedResult, usage: Usage, model: str, encoding: str) -> list[bytes]:
    """OpenAI's response body, in pieces. `model` is the name in the request."""
    pieces: list[bytes] = [b'{"object":"list","data":[']
    numbers, per_turn, separators = encoding == "float", VECTORS_PER_TURN[encoding], _SEPARATORS[encoding]
    if len(result.embeddings) > len(separators):
        separators = tuple([_separator(index, encoding) for index in range(len(result.embeddings))])
    for i, embedding in enumerate(result.embeddings):
        if i % per_turn == 0 and i:
            await asyncio.sleep(0)
        separator, vector = separators[i], embedding.vector
        if embedding.sparse is not None:
            separator = _separator(i, encoding, b'"sparse_embedding":%b,' % embedding.sparse)
        pieces += (separator, (embedding.text or vectors.to_json(vector)) if numbers else vectors.to_base64(vector))
    pieces.append(
        b'%b}],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}}'
        % (
            _QUOTE[encoding],
            orjson.dumps(model),
            usage.tokens,
            usage.tokens,
            usage.cached_tokens + usage.shared_tokens,
        )
    )
    return pieces


def result_headers(result: EmbedResult, usage: Usage, space: str) -> bytes:
    """The `x-embedding-*` header lines: where the vectors came from, and which others they may be compared with."""
    cached = usage.cached
    state = b"hit" if cached == len(result.sources) else b"partial" if cached else b"miss"
    lines = b"x-embedding-cache: %b\r\nx-embedding-cached-inputs: %d\r\nx-embedding-upstream-calls: %d\r\n%b" % (
        state,
        cached,
        result.calls,
        _origin_headers(space, vectors.dimensions(result.embeddings[0].vector), result.deployments),
    )
    if result.truncated:
        lines += b"x-embedding-truncated-inputs: %d\r\n" % result.truncated
    if result.split:
        lines += b"x-embedding-split-inputs: %d\r\n" % result.split
    return lines


@lru_cache(maxsize=1024)
def _origin_headers(space: str, length: int, deployments: tuple[str, ...]) -> bytes:
    """The header lines that name the vector space and the deployments. Sparse vectors have no length."""
    headers = [(b"x-embedding-space", _header_value(f"{space};{length or 'sparse'}"))]
    if deployments:
        headers.append((b"x-embedding-upstream", _header_value(", ".join(deployments))))
    return encode_headers(headers)


def encode_headers(headers: Sequence[Header]) -> bytes:
    """Headers as lines of HTTP/1.1."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


@lru_cache(maxsize=2)
def head_end(second: int, keep_alive: bool) -> bytes:
    """The end of a response head: its date (RFC 9110 6.6.1; uvicorn adds its own to the heads it writes), whether the
    connection closes, and the empty line. `second`: since the epoch."""
    date = formatdate(second, usegmt=True).encode()
    return b"date: %b\r\n%b\r\n" % (date, b"" if keep_alive else b"connection: close\r\n")


def decode_headers(lines: bytes) -> list[Header]:
    """The inverse of `encode_headers`, for ASGI's `send`, which takes headers in pairs."""
    pairs = [line.partition(b": ") for line in lines.splitlines()]
    return [(name, value) for name, _, value in pairs]


def _header_value(text: str) -> bytes:
    """Encodes a header's value. Upstreams name models as they like, line breaks included."""
    return text.encode() if text.isprintable() else quote(text, safe=" /:;,@").encode()


def rate_limit_headers(limit_statuses: Sequence[LimitStatus]) -> list[Header]:
    """`x-ratelimit-*`, as at OpenAI (developers.openai.com/api/docs/guides/rate-limits#rate-limits-in-headers)."""
    headers: list[Header] = []
    for status in limit_statuses:
        kind = status.kind.encode()
        headers += (
            (b"x-ratelimit-limit-" + kind, b"%d" % status.limit),
            (b"x-ratelimit-remaining-" + kind, b"%d" % status.remaining),
            (b"x-ratelimit-reset-" + kind, duration(status.reset)),
        )
    return headers


def duration(seconds: float) -> bytes:
    """Formats a duration as Go and OpenAI do: `12ms`, `1s`, `8.64s`, `6m0s`. Rounds up to whole milliseconds."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return b"%dms" % milliseconds
    minutes, rest = divmod(milliseconds, 60_000)
    formatted = b"%g" % (rest / 1000) + b"s"
    return b"%dm" % minutes + formatted if minutes else formatted


def error_body(error: GatewayError) -> bytes:
    """OpenAI's error shape."""
    return orjson.dumps(
        {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    )


def error_headers(error: GatewayError) -> list[Header]:
    """When to retry, in every form the SDKs read, or not to, where a retry cannot help.

    Waits are clamped to 1–60 s: beyond that, one SDK does not retry at all and another sleeps the whole time.
    """
    headers: list[Header] = []
    if isinstance(error, Overloaded | RateLimited):
        wait = min(60.0, max(1.0, error.retry_after or 1.0))
        headers += [
            (b"retry-after", b"%d" % math.ceil(wait)),
            (b"retry-after-ms", b"%d" % math.ceil(round(wait * 1000, 3))),
        ]
    elif error.status >= 429 and (error.no_client_retry or not error.retryable):
        headers.append((b"x-should-retry", b"false"))
    if error.calls:
        headers.append((b"x-embedding-upstream-calls", b"%d" % error.calls))
    return headers
