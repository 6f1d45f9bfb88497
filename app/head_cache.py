"""Request heads that come again: a client sends one with every request, and only the body's length in it differs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD = 4 * 2**10
"""Bytes up to which a head is worth keeping, for as long as its connection lives."""
MAX_STORES = 4
"""Heads that a connection keeps in all, each in place of the one before. Where all differ, no more are kept."""

_LENGTH = b"content-length"
_PARSED_ONLY = {b"transfer-encoding", b"upgrade", b"expect"}
"""Headers that the parser must see to each time anew."""


class Head(Struct, frozen=True):
    """A head as it came, in two parts around the digits of its `content-length`, and what the parser made of it."""

    before: bytes
    behind: bytes
    scope: Mapping[str, Any]
    """ASGI's scope, without what belongs to one request alone."""
    place: int
    """Of `content-length` among the headers."""

    def digits(self, data: bytes, end: int) -> bytes | None:
        """The digits of the length, if the first `end` bytes of `data` are this head in all else: then the parser would
        find nothing in them that it did not find in this one."""
        digits = data[len(self.before) : end - len(self.behind)]
        alike = data.startswith(self.before) and data.startswith(self.behind, end - len(self.behind))
        return digits if alike and digits.isdigit() and len(digits) < 16 else None

    def again(self, digits: bytes) -> dict[str, Any]:
        """What the parser would make of this head with another length."""
        headers = self.scope["headers"].copy()
        headers[self.place] = (_LENGTH, digits)
        return {**self.scope, "headers": headers}


def learn(head: bytes, scope: Mapping[str, Any]) -> Head | None:
    """This head and the scope that the parser made of it, to be known again. None where one like it had better be
    parsed again: wherever the plainest way to read it does not give the same headers."""
    lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    pairs = [line.partition(b":") for line in lines[1:]]
    headers = [(name.lower(), value.strip(b" \t")) for name, _, value in pairs]
    names = [name for name, _ in headers]
    if len(head) > MAX_HEAD or headers != scope["headers"]:
        return None
    if names.count(_LENGTH) != 1 or not _PARSED_ONLY.isdisjoint(names):
        return None
    place = names.index(_LENGTH)
    digits = headers[place][1]
    line = lines[1 + place]
    before = b"\r\n".join([*lines[: 1 + place], line[: line.rindex(digits)]])
    kept = {name: value for name, value in scope.items() if name not in ("state", "extensions")}
    return Head(before, head[len(before) + len(digits) :], {**kept, "headers": headers}, place)


class HeadCachingProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which remembers one head a connection and does not parse it when it comes again."""

    _known: Head | None = None
    _given = b""
    """The head that the parser is given, until it has found the end of it."""
    _lessons = MAX_STORES
    _body_left = 0
    """Bytes still to come of a body whose head was known: the parser is told of neither."""

    def start_cached(self, data: bytes, end: int) -> bytes | None:
        """Begins the request whose head is the first `end` bytes of `data`, as the server does once it has parsed one,
        and returns what is behind its body. None if it is to be parsed: its head is not known, or a request before it
        is not answered yet."""
        head = self._known
        digits = head.digits(data, end) if head else None
        if head is None or digits is None or not self.cycle.response_complete:
            self._given = data[:end] if self._lessons else b""
            return None
        scope: Any = head.again(digits)
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
            keep_alive=True,  # or the connection would have ended with the one before
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
        """Takes a piece of the body that is still owed. Returns what is behind the body."""
        body, behind = data[: self._body_left], data[self._body_left :]
        self._body_left -= len(body)
        if body:
            self.on_body(body)
        if not self._body_left:
            self.on_message_complete()
        return behind

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser leaves the white space behind a value, which is no part of it (RFC 9110 5.5)."""
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self._given:
            self._lessons -= 1
            self._known = learn(self._given, self.scope)
            self._given = b""
