"""One HTTP/1.1 connection to an upstream: sends a request, reads its reply to the end, bounded in bytes.

The framing is llhttp's (httptools), as in the server in front. A body of known length is received where it is going
to stay: neither the parser nor a list of chunks sees it.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httptools

from app.errors import GatewayError, UpstreamInvalidResponse, UpstreamUnreachable
from app.types import WireReply

LONGEST_HEAD = 64 * 2**10
"""Bytes of status line and headers; a reply whose head goes on is not read further."""

AT_FIRST = 2**20
"""Bytes that a body has room for at first; when it is full its room is doubled. Memory is taken for what has come, not
for what a reply announces."""

_BODILESS = frozenset((204, 304))


class StaleConnection(UpstreamUnreachable):
    """The connection ended before the first byte of a reply: kept alive, it may have been closed long before."""


def too_large(limit: int) -> UpstreamInvalidResponse:
    return UpstreamInvalidResponse(f"the upstream's reply is larger than {limit} bytes")


class Connection(asyncio.BufferedProtocol):
    """One exchange at a time. Heads are received into `scratch`, which connections of one event loop may share: it is
    read as soon as it is written."""

    def __init__(self, scratch: memoryview) -> None:
        self._scratch = scratch
        self.transport: asyncio.Transport
        self.closed = False
        """Whether it can carry no further request."""
        self._done: asyncio.Future[WireReply] | None = None
        self._tunnel = False
        self._max_reply = 0
        self._parser: Any = None
        self._reset()

    def _reset(self) -> None:
        self._headers: dict[str, str] = {}
        self._status = 0
        self._received = self._size = 0
        self._ends_with_connection = False
        self._body: bytearray | None = None
        self._length = 0
        """Of a body whose length is told beforehand."""
        self._chunks = bytearray()
        """A body whose length is not told beforehand, as far as it has come."""

    def exchange(self, request: bytes, max_reply: int, *, tunnel: bool = False) -> asyncio.Future[WireReply]:
        """Sends a whole request. The future raises `StaleConnection`, `UpstreamUnreachable`, or
        `UpstreamInvalidResponse` for a reply over `max_reply` bytes. `tunnel`: a CONNECT, whose reply ends with its
        head.

        Whoever stops waiting closes the connection.
        """
        self._reset()
        self._max_reply, self._tunnel = max_reply, tunnel
        self._parser = httptools.HttpResponseParser(self)
        self._done = done = asyncio.get_running_loop().create_future()
        if self.closed:
            self._fail(StaleConnection("the connection to the upstream broke"))
        else:
            self.transport.write(request)
        return done

    def close(self) -> None:
        """At once: what is still to be sent or received is of no use to anyone."""
        self.closed = True
        self.transport.abort()

    # --- what the event loop calls ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # as much as there is room for
        if self._body is None:
            return self._scratch
        if self._size == len(self._body):
            self._body += bytes(min(self._size, self._length - self._size))
        return memoryview(self._body)[self._size :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._done is None:
            self.close()  # a reply nobody asked for: whose would the next one be?
        elif self._body is not None:
            self._size += nbytes
            self._finish_if_whole()
        else:
            self._feed(nbytes)

    def eof_received(self) -> None:
        """Closes the connection, which is what the end of a stream means here."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done is None:
            return
        if exc is None and self._ends_with_connection:
            self._succeed(self._chunks)
        else:
            kind = UpstreamUnreachable if self._received else StaleConnection
            self._fail(kind("the connection to the upstream broke"))

    def _feed(self, nbytes: int) -> None:
        self._received += nbytes
        try:
            self._parser.feed_data(self._scratch[:nbytes])
        except httptools.HttpParserUpgrade:
            self._refuse(UpstreamInvalidResponse("the upstream switched to another protocol"))
        except httptools.HttpParserError:
            self._refuse(UpstreamInvalidResponse("the upstream's reply is not HTTP"))
        if not self._status and self._received > LONGEST_HEAD:
            self._refuse(UpstreamInvalidResponse("the headers of the upstream's reply are too large"))
        if self._received > 2 * self._max_reply + LONGEST_HEAD:  # chunks of a byte, trailers without end
            self._refuse(too_large(self._max_reply))

    # --- what the parser calls ------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._done is None:
            self.close()  # there is more than was asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        """Names in lower case; lines of one name are one, and what is not UTF-8 is replaced (RFC 9110 5.3, 5.5).
        What comes behind the head is not of it: trailers (6.5.1), or a second reply."""
        if self._status >= 200:
            return
        key, text = name.decode("latin-1").lower(), value.decode("utf-8", "replace")
        self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        if self._done is None:
            return
        self._status = status = self._parser.get_status_code()
        if self._tunnel and status >= 200:
            self._succeed(b"")
            return
        if status < 100:
            self._refuse(UpstreamInvalidResponse("the upstream's reply is not HTTP"))
        if status < 200 or status in _BODILESS:
            return
        length = self._headers.get("content-length")
        if "transfer-encoding" in self._headers:
            return
        if length is None:
            self._ends_with_connection = True
        elif int(length) > self._max_reply:
            self._refuse(too_large(self._max_reply))
        elif int(length):
            self._length = int(length)
            self._body = bytearray(min(self._length, AT_FIRST))

    def on_body(self, chunk: bytes) -> None:
        if self._done is None:
            return
        before, self._size = self._size, self._size + len(chunk)
        if self._body is not None:
            self._body[before : self._size] = chunk
            self._finish_if_whole()
        elif self._size > self._max_reply:
            self._refuse(too_large(self._max_reply))
        else:
            self._chunks += chunk

    def on_message_complete(self) -> None:
        if self._status < 200:  # "100 Continue" and its like: the reply is still to come
            self._headers.clear()
        elif self._done is not None:
            self._succeed(self._chunks)

    # --- how it ends ------------------------------------------------------------------------------------------

    def _finish_if_whole(self) -> None:
        body = self._body
        if body is not None and self._size == self._length:
            self._succeed(body)

    def _succeed(self, body: bytes | bytearray) -> None:
        if self._ends_with_connection or not (self._tunnel or self._parser.should_keep_alive()):
            self.close()  # which over TLS does not wait for the other side's goodbye
        if done := self._over():
            done.set_result(WireReply(self._status, self._headers, body))

    def _refuse(self, error: UpstreamInvalidResponse) -> None:
        self._fail(error)
        self.close()

    def _fail(self, error: GatewayError) -> None:
        if done := self._over():
            done.set_exception(error)

    def _over(self) -> asyncio.Future[WireReply] | None:
        """Ends the exchange. Returns who waits for it, if anybody does."""
        done, self._done, self._body = self._done, None, None
        self._chunks = bytearray()  # or they would be kept for as long as it lies idle
        return done if done is not None and not done.done() else None
