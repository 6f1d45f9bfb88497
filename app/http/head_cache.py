"""A cache of parsed request heads: a client sends the same head with every request, except for its content-length."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD = 4 * 2**10
"""Bytes up to which a head is worth caching for the life of its connection."""
MAX_STORES = 4
"""Heads that a connection caches in its life, each replacing the last: if they keep differing, it stops trying."""
MAX_HEADERS = 256
"""Headers of a request, at most, and trailers. Other servers take 100; each takes 30 times its text in memory, which an
idle connection keeps."""

_LENGTH = b"content-length"
_UNCACHEABLE = {b"transfer-encoding", b"upgrade", b"expect"}
"""Headers that the parser must process each time."""


class CachedHead(Struct, frozen=True):
    """A raw head, split around the digits of its `content-length`, and the scope that the parser made of it."""

    before: bytes
    after: bytes
    scope: Mapping[str, Any]
    """The ASGI scope, without what belongs to a single request."""
    length_index: int
    """Position of `content-length` in the headers."""

    def matching_length(self, data: bytes, end: int) -> bytes | None:
        """The digits of the content-length, if the first `end` bytes of `data` otherwise equal this head: the parser
        would then find nothing new in them."""
        digits = data[len(self.before) : end - len(self.after)]
        matches = data.startswith(self.before) and data.startswith(self.after, end - len(self.after))
        return digits if matches and digits.isdigit() and len(digits) < 16 else None

    def with_length(self, digits: bytes) -> dict[str, Any]:
        """The scope that the parser would make of this head with another content-length."""
        headers = self.scope["headers"].copy()
        headers[self.length_index] = (_LENGTH, digits)
        return {**self.scope, "headers": headers}


def cache_entry(head: bytes, scope: Mapping[str, Any]) -> CachedHead | None:
    """The cache entry for a head and the scope that the parser made of it. None if heads like it must be parsed every
    time: wherever naive splitting does not give the same headers."""
    lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    pairs = [line.partition(b":") for line in lines[1:]]
    headers = [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]
    names = [name for name, _ in headers]
    if len(head) > MAX_HEAD or headers != scope["headers"]:
        return None
    if names.count(_LENGTH) != 1 or not _UNCACHEABLE.isdisjoint(names):
        return None
    length_index = names.index(_LENGTH)
    digits = headers[length_index][1]
    line = lines[1 + length_index]
    before = b"\r\n".join([*lines[: 1 + length_index], line[: line.rindex(digits)]])
    kept = {name: value for name, value in scope.items() if name not in ("state", "extensions")}
    return CachedHead(before, head[len(before) + len(digits) :], {**kept, "headers": headers}, length_index)


class HeadCachingProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which caches one head per connection and does not parse it when it is repeated."""

    _cached: CachedHead | None = None
    _candidate = b""
    """The head that the parser is working on, if it may be cached."""
    _stores_left = MAX_STORES
    _body_left = 0
    """Bytes still to come of a body whose head was cached: the parser sees neither."""
    problem = ""
    """What is wrong with the request, where the parser, which only says that it is invalid, does not know."""

    def start_cached(self, data: bytes, end: int) -> bytes | None:
        """Starts the request whose head is the first `end` bytes of `data`, as uvicorn does after parsing one, and
        returns the data after its body. None if it must be parsed: its head is not cached, or the previous request is
        not answered yet."""
        head = self._cached
        digits = head.matching_length(data, end) if head else None
        if head is None or digits is None or not self.cycle.response_complete:
            self._candidate = data[:end] if self._stores_left else b""
            return None
        scope: Any = head.with_length(digits)
        scope["state"] = self.app_state.copy()
        self.scope = scope
        self.cycle = cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=True,  # or the connection would have ended with the previous request
            on_response=self.on_response_complete,
        )
        self._start_asgi_task(cycle, self.app)
        self._body_left = int(digits)
        if len(data) - end != self._body_left:
            return self.feed_body(data[end:])
        self._body_left = 0
        cycle.body += data[end:]
        cycle.more_body = False
        cycle.message_event.set()
        return b""

    def feed_body(self, data: bytes) -> bytes:
        """Receives the next piece of the body. Returns the data after the body."""
        body, after = data[: self._body_left], data[self._body_left :]
        self._body_left -= len(body)
        if body:
            self.on_body(body)
        if not self._body_left:
            self.on_message_complete()
        return after

    def on_header(self, name: bytes, value: bytes) -> None:
        """Strips white space after a value, which is not part of it (RFC 9110 5.5); the parser does not. Raising makes
        the parser reject the request."""
        if len(self.headers) >= MAX_HEADERS:
            self.problem = f"The request has more than {MAX_HEADERS} headers."
            raise ValueError("headers")
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self._candidate:
            self._stores_left -= 1
            self._cached = cache_entry(self._candidate, self.scope)
            self._candidate = b""
