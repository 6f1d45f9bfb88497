"""Results and errors to the bytes of a response, straight from float32: no model, no list of floats."""

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
"""Vectors rendered in one go; then other requests get a turn on the event loop. 64 of 1,024 numbers each take 2 ms."""


_QUOTE = {"float": b"", "base64": b'"'}
"""Around a vector."""


def _before(index: int, encoding: str, more: bytes = b"") -> bytes:
    """What is printed between the previous vector and this one, with their quotes. `more`: further members of this
    one's object, each with a comma behind it."""
    end = _QUOTE[encoding] + b"}," if index else b""
    return b'%b{"object":"embedding","index":%d,%b"embedding":%b' % (end, index, more, _QUOTE[encoding])


_BEFORE = {encoding: tuple(_before(index, encoding) for index in range(2048)) for encoding in VECTORS_PER_TURN}
"""To print a number takes longer than to look it up."""


async def embeddings(result: EmbedResult, usage: Usage, model: str, encoding: str) -> list[bytes]:
    """OpenAI's response body, in pieces. `model` is the name that was asked for."""
    pieces: list[bytes] = [b'{"object":"list","data":[']
    numbers, at_once, known = encoding == "float", VECTORS_PER_TURN[encoding], _BEFORE[encoding]
    if len(result.embeddings) > len(known):
        known = tuple([_before(index, encoding) for index in range(len(result.embeddings))])
    for i, embedding in enumerate(result.embeddings):
        if i % at_once == 0 and i:
            await asyncio.sleep(0)
        before, vector = known[i], embedding.vector
        if embedding.sparse is not None:
            before = _before(i, encoding, b'"sparse_embedding":%b,' % embedding.sparse)
        pieces += (before, (embedding.text or vectors.to_json(vector)) if numbers else vectors.to_base64(vector))
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
    """`x-embedding-*`: how the answer came about, and which vectors it may be compared with; a line each."""
    cached = usage.cached
    state = b"hit" if cached == len(result.sources) else b"partial" if cached else b"miss"
    lines = b"x-embedding-cache: %b\r\nx-embedding-cached-inputs: %d\r\nx-embedding-upstream-calls: %d\r\n%b" % (
        state,
        cached,
        result.calls,
        _origin(space, vectors.dimensions(result.embeddings[0].vector), result.deployments),
    )
    if result.truncated:
        lines += b"x-embedding-truncated-inputs: %d\r\n" % result.truncated
    if result.split:
        lines += b"x-embedding-split-inputs: %d\r\n" % result.split
    return lines


@lru_cache(maxsize=1024)
def _origin(space: str, length: int, deployments: tuple[str, ...]) -> bytes:
    """The headers that say which space the vectors are in and who gave them. Sparse ones have no length."""
    headers = [(b"x-embedding-space", _field(f"{space};{length or 'sparse'}"))]
    if deployments:
        headers.append((b"x-embedding-upstream", _field(", ".join(deployments))))
    return lines(headers)


def lines(headers: Sequence[Header]) -> bytes:
    """Headers as they are written."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


@lru_cache(maxsize=2)
def head_end(second: int, keep_alive: bool) -> bytes:
    """How a head ends: with its date (RFC 9110 6.6.1; where the server writes the head, it has one of its own), and
    whether it is the last on its connection. `second`: since the epoch."""
    date = formatdate(second, usegmt=True).encode()
    return b"date: %b\r\n%b\r\n" % (date, b"" if keep_alive else b"connection: close\r\n")


def headers(lines: bytes) -> list[Header]:
    """What `lines` was given, for a server that wants headers one by one."""
    pairs = [line.partition(b": ") for line in lines.splitlines()]
    return [(name, value) for name, _, value in pairs]


def _field(text: str) -> bytes:
    """A header's value. Upstreams name models as they like, line ends and all."""
    return text.encode() if text.isprintable() else quote(text, safe=" /:;,@").encode()


def rate_limit_headers(limit_statuses: Sequence[LimitStatus]) -> list[Header]:
    """`x-ratelimit-*` as OpenAI has them (developers.openai.com/api/docs/guides/rate-limits#rate-limits-in-headers)."""
    headers: list[Header] = []
    for each in limit_statuses:
        kind = each.kind.encode()
        headers += (
            (b"x-ratelimit-limit-" + kind, b"%d" % each.limit),
            (b"x-ratelimit-remaining-" + kind, b"%d" % each.remaining),
            (b"x-ratelimit-reset-" + kind, duration(each.reset)),
        )
    return headers


def duration(seconds: float) -> bytes:
    """As Go and OpenAI write it: `12ms`, `1s`, `8.64s`, `6m0s`. Rounded up to whole milliseconds."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return b"%dms" % milliseconds
    minutes, rest = divmod(milliseconds, 60_000)
    told = b"%g" % (rest / 1000) + b"s"
    return b"%dm" % minutes + told if minutes else told


def error_body(error: GatewayError) -> bytes:
    """OpenAI's error shape."""
    return orjson.dumps(
        {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    )


def error_headers(error: GatewayError) -> list[Header]:
    """When to ask again, in the forms the SDKs read; and not to, where asking again cannot help.

    Waits are clamped to 1–60 s: beyond that one SDK does not retry at all and another sleeps it out.
    """
    headers: list[Header] = []
    if isinstance(error, Overloaded | RateLimited):
        wait = min(60.0, max(1.0, error.retry_after or 1.0))
        headers += [(b"retry-after", b"%d" % math.ceil(wait)), (b"retry-after-ms", b"%d" % round(wait * 1000))]
    elif error.status >= 429 and (error.no_client_retry or not error.retryable):
        headers.append((b"x-should-retry", b"false"))
    if error.calls:
        headers.append((b"x-embedding-upstream-calls", b"%d" % error.calls))
    return headers
