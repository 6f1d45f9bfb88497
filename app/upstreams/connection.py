"""One HTTP/1.1 connection to an upstream: sends a request and reads the whole reply, bounded in bytes.

llhttp (httptools) does the framing, as in our own server. A body of known length is received straight into its final
buffer: it passes through neither the parser nor a list of chunks.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, cast

import httptools

from app.errors import GatewayError, UpstreamInvalidResponse, UpstreamUnreachable
from app.types import WireReply

MAX_REPLY_HEAD = 64 * 2**10
"""Maximum bytes of status line and headers; no more is read of a reply that exceeds it."""

INITIAL_BODY = 2**20
"""Initial size of a body's buffer in bytes, doubled whenever it is full. Memory grows with what has arrived, not with
what a reply announces."""

LARGE_REQUEST = 64 * 2**10
"""Bytes of a request above which an error may come before the rest of it is sent, which would delay the next request on
the connection. How much is unsent cannot be told: it is in the buffers of the transport, of TLS and of the kernel."""

_LENIENCIES = {
    "lenient_headers": True,
    "lenient_optional_cr_before_lf": True,
    "lenient_spaces_after_chunk_size": True,
}
"""What other clients read too: folded headers and control characters in them, lines of the head that end in LF,
padded chunk sizes. None of it leaves open where a reply ends."""

_BODILESS = frozenset((204, 304))


class StaleConnection(UpstreamUnreachable):
    """The connection ended before the first byte of a reply: a kept-alive one may have been closed long before."""


def too_large(limit: int) -> UpstreamInvalidResponse:
    return UpstreamInvalidResponse(f"the upstream's reply is larger than {limit} bytes")


class Connection(asyncio.BufferedProtocol):
    """Carries one exchange at a time. Heads are received into `scratch`, which all connections of an event loop may
    share: it is read as soon as it is written."""

    def __init__(self, scratch: memoryview) -> None:
        self._scratch = scratch
        self.transport: asyncio.Transport
        self.opened = 0.0
        """When, in the event loop's time."""
        self.closed = False
        """Whether it can carry no further requests."""
        self._waiter: asyncio.Future[WireReply] | None = None
        self._tunnel = self._large_request = False
        self._max_reply = 0
        self._parser: Any = None
        self._reset()

    def _reset(self) -> None:
        self._headers: dict[str, str] = {}
        self._status = 0
        self._received = self._size = 0
        self._ends_at_close = False
        self._body: bytearray | None = None
        self._content_length = 0
        """Of a body whose length is announced."""
        self._chunks = bytearray()
        """What has arrived of a body whose length was not announced."""

    def exchange(self, request: bytes, max_reply: int, *, tunnel: bool = False) -> asyncio.Future[WireReply]:
        """Sends a complete request. The future raises `StaleConnection`, `UpstreamUnreachable`, or
        `UpstreamInvalidResponse`, which includes a reply over `max_reply` bytes. `tunnel`: a CONNECT, whose reply ends
        with its head.

        A caller that stops waiting must close the connection.
        """
        self._reset()
        self._max_reply, self._tunnel = max_reply, tunnel
        self._large_request = len(request) > LARGE_REQUEST
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(**_LENIENCIES)
        self._waiter = waiter = asyncio.get_running_loop().create_future()
        if self.closed:
            self._fail(StaleConnection("the connection to the upstream broke"))
        else:
            self.transport.write(request)
        return waiter

    def close(self) -> None:
        """Closes at once: nobody needs what is still to be sent or received."""
        self.closed = True
        self.transport.abort()

    # --- called by the event loop -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.opened = asyncio.get_running_loop().time()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # only a hint
        if self._body is None:
            return self._scratch
        if self._size == len(self._body):
            self._body += bytes(min(self._size, self._content_length - self._size))
        return memoryview(self._body)[self._size :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._waiter is None:
            self.close()  # an unsolicited reply: it would be taken for the next request's
        elif self._body is not None:
            self._size += nbytes
            self._finish_if_complete()
        else:
            self._feed(nbytes)

    def eof_received(self) -> None:
        """Returns None, on which the transport closes: a half-closed connection is of no use."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._waiter is None:
            return
        if exc is None and self._ends_at_close:
            self._succeed(self._chunks)
        else:
            self._fail(self._broken(exc))

    def _broken(self, exc: Exception | None) -> GatewayError:
        if self._received:
            return UpstreamUnreachable("the connection to the upstream broke")
        if isinstance(exc, ssl.SSLError) and "ALERT" in (exc.reason or ""):
            # With TLS 1.3 the peer looks for our certificate after the handshake.
            error = StaleConnection(f"the upstream refused the TLS connection: {exc.reason.replace('_', ' ').lower()}")
            error.retryable = False  # the next connection would be refused as well
            return error
        return StaleConnection("the connection to the upstream broke")

    def _feed(self, nbytes: int) -> None:
        self._received += nbytes
        try:
            self._parser.feed_data(self._scratch[:nbytes])
        except httptools.HttpParserUpgrade:
            self._refuse(UpstreamInvalidResponse("the upstream switched to another protocol"))
        except httptools.HttpParserError:
            self._refuse(UpstreamInvalidResponse("the upstream's reply is not HTTP"))
        if self._status < 200 and self._received > MAX_REPLY_HEAD:  # interim heads count
            self._refuse(UpstreamInvalidResponse("the headers of the upstream's reply are too large"))
        if self._received > 2 * self._max_reply + MAX_REPLY_HEAD:  # one-byte chunks, endless trailers
            self._refuse(too_large(self._max_reply))

    # --- called by the parser -------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._waiter is None:
            self.close()  # a second reply to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        """Lower-cases the name, which a lenient parser ends with a space if one precedes the colon, joins lines of one
        name, and replaces what is not UTF-8 (RFC 9110 5.3, 5.5). Ignores what follows the head: trailers (6.5.1), or a
        second reply's headers."""
        if self._status >= 200:
            return
        key, text = name.decode("latin-1").rstrip().lower(), value.decode("utf-8", "replace")
        self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        if self._waiter is None:
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
            self._ends_at_close = True
        elif int(length) > self._max_reply:
            self._refuse(too_large(self._max_reply))
        elif int(length):
            self._content_length = int(length)
            self._body = bytearray(min(self._content_length, INITIAL_BODY))

    def on_body(self, chunk: bytes) -> None:
        if self._waiter is None:
            return
        start, self._size = self._size, self._size + len(chunk)
        if self._body is not None:
            self._body[start : self._size] = chunk
            self._finish_if_complete()
        elif self._size > self._max_reply:
            self._refuse(too_large(self._max_reply))
        else:
            self._chunks += chunk

    def on_message_complete(self) -> None:
        if self._status < 200:  # interim, such as 100 Continue: the final reply follows
            self._headers.clear()
        elif self._waiter is not None:
            self._succeed(self._chunks)

    # --- the end of an exchange -------------------------------------------------------------------------------

    def _finish_if_complete(self) -> None:
        body = self._body
        if body is not None and self._size == self._content_length:
            self._succeed(body)

    def _succeed(self, body: bytes | bytearray) -> None:
        early = self._large_request and self._status >= 300
        if self._ends_at_close or early or not (self._tunnel or self._parser.should_keep_alive()):
            self.close()  # without waiting for the peer's close_notify over TLS
        if waiter := self._end_exchange():
            waiter.set_result(WireReply(self._status, self._headers, body))

    def _refuse(self, error: UpstreamInvalidResponse) -> None:
        self._fail(error)
        self.close()

    def _fail(self, error: GatewayError) -> None:
        if waiter := self._end_exchange():
            waiter.set_exception(error)

    def _end_exchange(self) -> asyncio.Future[WireReply] | None:
        """Ends the exchange. Returns its future, unless nobody waits for it any more."""
        waiter, self._waiter, self._body = self._waiter, None, None
        self._chunks = bytearray()  # an idle connection holds no body
        return waiter if waiter is not None and not waiter.done() else None
