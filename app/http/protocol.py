"""uvicorn's HTTP protocol, hardened and limited to what an embeddings server needs. It never switches protocols.

Java's HTTP client and `curl --http2` offer HTTP/2 with every request (`Upgrade: h2c`), as RFC 9110 7.8 allows, and a
server may ignore the offer. The parser instead stops there and takes the body for the next request
(Kludex/uvicorn#2722), which is request smuggling. So the header is renamed before the parser sees it.
"""

from __future__ import annotations

import asyncio
import re
import termios
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.api.head import request_id
from app.api.render import error_body, head_end
from app.errors import InvalidRequest
from app.http.flow import MAX_PIPELINED, Flow, buffered
from app.http.head_cache import HeadCachingProtocol
from app.http.invalid import LONGEST_START
from app.http.outbox import Outbox

HEAD_TIMEOUT = 30.0
"""Seconds for a request's headers to arrive, from its first byte or the end of the previous response, whichever is
later. The request timeout applies instead if it is shorter."""
MAX_REQUEST_HEAD = 64 * 2**10
"""Bytes of request line and headers, at most, and of anything else that is not a body, such as trailers."""

SHUTDOWN_STALL_TIMEOUT = 5
"""Seconds after which a stopping server no longer waits for a caller that reads nothing of its response."""

_PARSE_CHUNK = 16 * 2**10
"""Bytes to parse before checking again how many requests wait. One read of the socket returns up to 256 KiB, which may
be 10,000 requests, and each takes 30 times the memory once parsed."""
_HOST = re.compile(rb"[\w.~!$&'()*+,;=%-]*(:\d{0,5})?|\[[0-9A-Fa-f:.]+\](:\d{0,5})?")
_END = b"\r\n\r\n"
_UPGRADE_NAME = re.compile(rb"(?i)(\r\n)upgrade(?=:)")


class Protocol(HeadCachingProtocol):
    """One connection. Errors below HTTP are answered in OpenAI's shape too.

    It adds four ASGI extensions to `scope["extensions"]`. `hang_up` is a set of callbacks, called when the connection
    is lost. `body` returns the whole body, or None if it has not arrived yet and `receive` must be used, which costs
    coroutines and an event. `respond` sends a whole response at once, from its head (without the final empty line) and
    the pieces of its body, and returns when the caller has taken it or disconnected; `send` needs two system calls,
    checks each header for what ours never contain, and does not wait until the response is taken. `first_byte`, present
    only if the head arrived in pieces, is when the wait for it began, on the event loop's clock.
    """

    _head = b""
    _start = b""  # the first bytes of the last head that was not cached, for the log
    _head_timer: asyncio.TimerHandle | None = None
    _parsing: Literal["", "head", "body"] = ""
    """The part of a request that the parser is in."""
    _first_byte = 0.0
    """When a head that arrives in pieces began, on the event loop's clock; 0 if there is none."""
    _fed = 0
    """Bytes fed to the parser since it last found the end of a head or a piece of a body."""
    _hosts: Sequence[bytes] = ()
    """The last Host header found valid, as the list of its one value."""
    _idle_since = 0.0
    _untaken = (0, 0, 0.0)
    """At the last check: the bytes of responses that the caller had not taken, in the transport's buffer and in the
    kernel's, and `_idle_since`."""

    def __init__(
        self,
        *args: Any,
        outbox: Outbox,
        on_invalid_http: Callable[[tuple[str, int] | None, bytes, str], None],
        timeout: Callable[[], float],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._outbox, self._on_invalid_http, self._timeout = outbox, on_invalid_http, timeout
        self._hang_up: set[Callable[[], None]] = set()
        self._running: RequestResponseCycle | None = None
        self._unparsed: deque[bytes] = deque()
        """Data read while `MAX_PIPELINED` requests were waiting, in pieces; it is parsed before any later data."""

    def data_received(self, data: bytes) -> None:
        if len(data) <= _PARSE_CHUNK and not self._unparsed:
            self._parse(data)
        else:
            self._unparsed.extend(data[i : i + _PARSE_CHUNK] for i in range(0, len(data), _PARSE_CHUNK))
            self._parse_pending()

    def _parse_pending(self) -> None:
        while self._unparsed and len(self.pipeline) < MAX_PIPELINED and not self.transport.is_closing():
            self._parse(self._unparsed.popleft())

    def _parse(self, data: bytes) -> None:
        if self._body_left:
            data = self.feed_body(data)
            if not data:
                return
        if not self._parsing:
            data = self._head + data
            end = data.find(_END)
            if end < 0 or end > MAX_REQUEST_HEAD:
                self._buffer_head(data)
                return
            self._head = b""
            self._stop_timer()
            end += len(_END)
            rest = self.start_cached(data, end)
            if rest is not None:
                self._add_extensions(self.scope)
                if rest:
                    self._parse(rest)
                return
            self._start = data[:LONGEST_START]
            if b"\r\nupgrade:" in data[:end].lower():
                data = _UPGRADE_NAME.sub(rb"\1ignored", data[:end]) + data[end:]
        self._fed += len(data)
        super().data_received(data)
        if self._parsing == "head" and not self.transport.is_closing():
            self._start_timer()  # it has part of a head that followed the previous request
        if self._fed > MAX_REQUEST_HEAD and not self.transport.is_closing():
            self.send_400_response("The request's headers are too large.")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.flow = Flow(transport)
        self.flow.pipeline = self.pipeline
        self._idle_since = self.loop.time()
        self._schedule_idle_check(self.timeout_keep_alive)

    def _buffer_head(self, head: bytes) -> None:
        """Buffers an incomplete head, unless it is invalid or too long. The parser gets heads whole, or an `Upgrade`
        could hide across two pieces."""
        self._start = head[:LONGEST_START]
        if len(head) > MAX_REQUEST_HEAD:
            self.send_400_response("The request's headers are too large.")
        elif not head.strip(b"\r\n"):
            self._head = b""  # an empty line after a body (RFC 9112 2.2)
        elif not head.lstrip(b"\r\n")[:1].isalpha():
            self.send_400_response("This is not HTTP; if it is TLS, use http:// or put a TLS proxy in front.")
        elif b"\n\n" in head:
            self.send_400_response("The request's lines must end in CRLF.")
        else:
            self._head = head
            self._start_timer()

    def _start_timer(self) -> None:
        if self._head_timer is None:
            self._first_byte = self.loop.time()
            self._head_timer = self.loop.call_later(self._head_timeout(), self._on_head_timeout)

    def _head_timeout(self) -> float:
        return min(HEAD_TIMEOUT, self._timeout())

    def _on_head_timeout(self) -> None:
        """Rejects a head that is late. While a request is being answered, the next head may take its time: nobody waits
        for it, and reading may be paused."""
        self._head_timer = None
        running = self._running
        answering = running is not None and not running.response_complete
        limit = self._head_timeout()
        remaining = limit if answering else self._idle_since + limit - self.loop.time()
        if remaining > 0:
            self._head_timer = self.loop.call_later(remaining, self._on_head_timeout)
        else:
            self.send_400_response("The request's headers did not arrive in time.")

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super()._unset_keepalive_if_required()
        super().connection_lost(exc)
        self.pipeline.clear()
        self._unparsed.clear()
        # uvicorn notifies the latest request, which is not the one being answered if others are pipelined behind that.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
        for callback in tuple(self._hang_up):
            callback()

    def on_headers_complete(self) -> None:
        """Requires HTTP/1, and with 1.1 a single valid Host (RFC 9112 3.2); raising makes the parser reject it."""
        version = self.parser.get_http_version()
        if not version.startswith("1."):
            raise ValueError("HTTP version")
        hosts = [value for name, value in self.headers if name == b"host"]
        if hosts != self._hosts:
            if len(hosts) == 1 and _HOST.fullmatch(hosts[0]):
                self._hosts = hosts
            elif version != "1.0":
                raise ValueError("Host")
        if self.expect_100_continue and version == "1.0":
            self.expect_100_continue = False  # HTTP/1.0 has no 100 (RFC 9110 10.1.1)
        scope: Any = self.scope
        super().on_headers_complete()
        if self.pipeline:
            self.flow.resume_reading()  # uvicorn pauses as soon as any request waits
        # Fields after the body are trailers, which are not headers of this request (RFC 9110 6.5.1).
        self.headers = []
        self._fed = 0
        self._parsing = "body"
        self._stop_timer()
        self._add_extensions(scope)

    def _add_extensions(self, scope: Any) -> None:
        # Nothing here may refer to the cycle, which holds the scope: only the garbage collector would free them.
        scope["extensions"] = {"hang_up": self._hang_up, "body": self._body, "respond": self._respond}
        if self._first_byte:
            if self._running is self.cycle:  # otherwise that time belongs to the previous request
                scope["extensions"]["first_byte"] = max(self._first_byte, self._idle_since)
            self._first_byte = 0.0

    def _body(self) -> bytes | None:
        """The whole body, if `receive` would not have to wait for it."""
        cycle = self._running
        assert cycle is not None
        if cycle.more_body or cycle.disconnected:
            return None
        self.flow.resume_reading()
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    async def _respond(self, head: bytes, body: list[bytes], size: int, until: float, *, last: bool = False) -> None:
        """Does what `send` does for a complete response with a content-length of `size`. Waits until the caller has
        taken it, except for the up to 64 KiB that a transport buffers without pausing its writer. `last` closes the
        connection afterwards. Raises `TimeoutError`, having aborted the connection, if the response is not taken by
        `until`, on the event loop's clock, or the server stops waiting."""
        cycle = self._running
        assert cycle is not None
        if self.flow.write_paused and not cycle.disconnected:
            await self._wait_taken(until)
        if cycle.disconnected:
            return
        if last:
            cycle.keep_alive = False
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        head += head_end(int(time.time()), cycle.keep_alive)
        self._outbox.put(self.transport, head, body, size, close=not cycle.keep_alive)
        if len(self.tasks) == 1 or not cycle.keep_alive:
            # There is no other response to wait for, or none may follow this one.
            self._outbox.flush()
        cycle.response_complete = True
        cycle.message_event.set()
        # The next pipelined request starts in a later turn of the event loop: its response cannot overtake this one.
        cycle.on_response()
        if self.flow.write_paused:
            await self._wait_taken(until)

    async def _wait_taken(self, until: float) -> None:
        """Waits until the caller has taken what was written, or has disconnected. At `until`, or when the server stops
        waiting, aborts the connection and raises `TimeoutError`."""
        try:
            async with asyncio.timeout_at(until):
                await self.flow.drain()
        except (TimeoutError, asyncio.CancelledError):
            self.transport.abort()
            await self.flow.drain()  # ends when the connection is lost
            raise TimeoutError from None

    # --- keep-alive: one timer that checks how long the connection has been idle, not a new one per request -----

    def on_response_complete(self) -> None:
        """As in uvicorn, except for the timer."""
        self.server_state.total_requests += 1
        self._idle_since = self.loop.time()
        if not self.transport.is_closing():
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            self._parse_pending()
            self.flow.resume_reading()
        elif not self.transport.get_write_buffer_size():
            return
        if self.timeout_keep_alive_task is None:
            self._schedule_idle_check(self.timeout_keep_alive)

    def _schedule_idle_check(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection that is idle, and aborts one whose caller reads nothing of what is written."""
        self.timeout_keep_alive_task = None
        untaken = self._measure_untaken()
        if untaken[0]:
            if untaken == self._untaken:
                self.transport.abort()
            else:
                self._untaken = untaken
                self._schedule_idle_check(self.timeout_keep_alive)
            return
        if self._head or not (self.cycle is None or self.cycle.response_complete):
            return  # not idle: the end of the next response starts a new timer
        remaining = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if remaining > 0 or buffered(self.transport, termios.FIONREAD):  # a request came while this process was paused
            self._schedule_idle_check(max(remaining, 0.1))
        else:
            super().timeout_keep_alive_handler()

    def _measure_untaken(self) -> tuple[int, int, float]:
        """The present value for `_untaken`."""
        return self.transport.get_write_buffer_size(), buffered(self.transport, termios.TIOCOUTQ), self._idle_since

    def _unset_keepalive_if_required(self) -> None:
        """Does nothing: the timer runs on, whatever arrives."""

    def shutdown(self) -> None:
        """As in uvicorn, but waits less long than usual for a caller that reads nothing."""
        self._outbox.flush()
        super().shutdown()
        super()._unset_keepalive_if_required()
        self.timeout_keep_alive = SHUTDOWN_STALL_TIMEOUT
        self._untaken = self._measure_untaken()
        if self._untaken[0]:
            self._schedule_idle_check(SHUTDOWN_STALL_TIMEOUT)

    def on_message_begin(self) -> None:
        self._parsing = "head"
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        self._fed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._parsing = ""
        self._fed = 0
        super().on_message_complete()
        self.flow.resume_reading()  # paused by a large body; a disconnect must be noticed

    def _unsupported_upgrade_warning(self) -> None:
        """CONNECT, or an upgrade pipelined behind another request: where the next request begins is not known."""
        self.send_400_response("This server switches to no other protocol.")

    def send_400_response(self, msg: str) -> None:
        self._outbox.flush()
        self.pipeline.clear()
        self._unparsed.clear()
        running = self._running
        if running is not None and not (running.response_complete or running.more_body or running.disconnected):
            # The error lies behind a request that is still being answered, whose caller would take this for its answer.
            running.keep_alive = False
            return
        self._on_invalid_http(self.client, self._start, self.problem or msg)
        body = error_body(InvalidRequest(self.problem or msg, code="invalid_http"))
        # Between requests the scope is the previous request's; of an invalid head it holds what has been parsed.
        headers = dict(self.scope["headers"]) if self._parsing else {}
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"x-request-id: %b\r\n%b%b" % (len(body), request_id(headers), head_end(int(time.time()), False), body)
        )
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # or its response would be written to a closed connection
            self.cycle.message_event.set()
        self.transport.close()
