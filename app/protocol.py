"""uvicorn's HTTP protocol, held to what an embeddings server is asked: no other protocol is ever switched to.

Java's HTTP client and `curl --http2` offer HTTP/2 with every request (`Upgrade: h2c`), as RFC 9110 7.8 lets
them; a server that does not want to ignores it. The parser stops there instead, and takes the body for the
next request (Kludex/uvicorn#2722), which is request smuggling. So the offer is made unreadable to it.
"""

from __future__ import annotations

import asyncio
import fcntl
import re
import sys
import termios
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.api.head import request_id
from app.api.render import error_body, head_end
from app.errors import InvalidRequest
from app.head_cache import HeadCachingProtocol
from app.outbox import Outbox

HEAD_TIMEOUT = 30.0
"""Seconds from a request's first byte, and from the end of the answer before it, to the end of its headers; at most,
for a request's time in all may be shorter."""
LONGEST_HEAD = 64 * 2**10
"""Bytes of request line and headers, or of what is neither these nor a body (trailers); more are refused."""

SHUTDOWN_STALL_TIMEOUT = 5
"""Seconds in which a caller must take some of its answer when the server stops, or the server stops waiting for it."""

FEW = 16
"""Requests that wait for the one before them: with fewer, more is read."""

_PIECE = 16 * 2**10
"""Bytes that are parsed before it is looked again how many requests wait. A read of the socket has up to 256 KiB, which
may be 10,000 requests; parsed, each takes 30 times the memory."""
_LINE = 150
"""Bytes of memory that a header takes besides its name and value, which may be two bytes."""
_HOST = re.compile(rb"[\w.~!$&'()*+,;=%-]*(:\d{0,5})?|\[[0-9A-Fa-f:.]+\](:\d{0,5})?")
_END = b"\r\n\r\n"
_OFFER = re.compile(rb"(?i)(\r\n)upgrade(?=:)")


class _Flow(FlowControl):
    """Reads nothing while many requests wait, or many bytes of their heads and bodies: the server alone would go on
    reading whenever a body is asked for, and they would pile up. While few wait it reads on, or a caller who hangs up
    would not be noticed."""

    pipeline: Collection[tuple[RequestResponseCycle, Any]] = ()

    def resume_reading(self) -> None:
        if self.read_paused and len(self.pipeline) < FEW and self._bytes_waiting() <= HIGH_WATER_LIMIT:
            super().resume_reading()

    def _bytes_waiting(self) -> int:
        waiting = [cycle for cycle, _ in self.pipeline]
        head_cache = sum(_LINE + len(name) + len(value) for cycle in waiting for name, value in cycle.scope["headers"])
        return head_cache + sum(len(cycle.body) for cycle in waiting)


def _unsent(transport: asyncio.Transport) -> int:
    """Bytes in the system's buffer that the other side has not taken; 0 where the system does not say."""
    try:
        count = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(count, sys.byteorder)


class Protocol(HeadCachingProtocol):
    """One connection. Errors below HTTP come in OpenAI's shape too.

    Four extensions of ASGI: `scope["extensions"]["hang_up"]` is a set of callbacks, called once the connection is
    lost. `scope["extensions"]["body"]` gives the whole body, or None where it has not come yet and `receive` is to be
    asked, which takes coroutines and an event. `scope["extensions"]["respond"]` sends a whole response, head (without
    the empty line that ends it) and body in pieces, at once, and returns when the caller has taken it, or is gone;
    `send` takes two system calls for it, looks at each header for what ours do not hold, and leaves to the connection
    what is not taken. `scope["extensions"]["first_byte"]`, there only where a head came in pieces and was waited for,
    is since when it was, on the event loop's clock.
    """

    _head = b""
    _head_timer: asyncio.TimerHandle | None = None
    _parsing: Literal["", "head", "body"] = ""
    """What the parser is in the middle of."""
    _first_byte = 0.0
    """On the event loop's clock, when the head began that is coming in pieces; 0 where none is."""
    _fed = 0
    """Bytes given to the parser since the last whole head or piece of a body that it found."""
    _hosts: Sequence[bytes] = ()
    """The values of the Host header, a single one, that were last found sane."""
    _idle_since = 0.0
    _untaken = (0, 0, 0.0)
    """As of the last look: bytes of answers that the caller had not taken, here and in the system's buffer, and
    `_idle_since`."""

    def __init__(
        self,
        *args: Any,
        outbox: Outbox,
        on_invalid_http: Callable[[], None],
        timeout: Callable[[], float],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._outbox, self._refused, self._timeout = outbox, on_invalid_http, timeout
        self._hang_up: set[Callable[[], None]] = set()
        self._running: RequestResponseCycle | None = None
        self._unparsed: deque[bytes] = deque()
        """Pieces of what was read behind `FEW` waiting requests: they are parsed before anything more is."""

    def data_received(self, data: bytes) -> None:
        if len(data) <= _PIECE and not self._unparsed:
            self._parse(data)
        else:
            self._unparsed.extend(data[i : i + _PIECE] for i in range(0, len(data), _PIECE))
            self._parse_on()

    def _parse_on(self) -> None:
        while self._unparsed and len(self.pipeline) < FEW and not self.transport.is_closing():
            self._parse(self._unparsed.popleft())

    def _parse(self, data: bytes) -> None:
        if self._body_left:
            data = self.feed_body(data)
            if not data:
                return
        if not self._parsing:
            data = self._head + data
            end = data.find(_END)
            if end < 0 or end > LONGEST_HEAD:
                self._keep(data)
                return
            self._head = b""
            self._stop_timer()
            end += len(_END)
            behind = self.start_cached(data, end)
            if behind is not None:
                self._extend(self.scope)
                if behind:
                    self._parse(behind)
                return
            if b"\r\nupgrade:" in data[:end].lower():
                data = _OFFER.sub(rb"\1ignored", data[:end]) + data[end:]
        self._fed += len(data)
        super().data_received(data)
        if self._parsing == "head" and not self.transport.is_closing():
            self._start_timer()  # it has a piece of one that came behind the request before it
        if self._fed > LONGEST_HEAD and not self.transport.is_closing():
            self.send_400_response("The request's headers are too large.")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the server has it
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self.flow.pipeline = self.pipeline
        self._idle_since = self.loop.time()
        self._look_again_in(self.timeout_keep_alive)

    def _keep(self, head: bytes) -> None:
        """Waits for the rest of a head, unless it is too long. The parser gets it whole, or an `Upgrade` could hide
        where two pieces meet."""
        if len(head) > LONGEST_HEAD:
            self.send_400_response("The request's headers are too large.")
        elif not head.strip(b"\r\n"):
            self._head = b""  # an empty line behind a body (RFC 9112 2.2)
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
            self._head_timer = self.loop.call_later(self._head_timeout(), self._late)

    def _head_timeout(self) -> float:
        return min(HEAD_TIMEOUT, self._timeout())

    def _late(self) -> None:
        """Refuses a head that is late. While a request is being answered the next one's head has time: nobody waits for
        it, and it may be that nothing is read."""
        self._head_timer = None
        running = self._running
        answering = running is not None and not running.response_complete
        limit = self._head_timeout()
        left = limit if answering else self._idle_since + limit - self.loop.time()
        if left > 0:
            self._head_timer = self.loop.call_later(left, self._late)
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
        # The server tells the request that came last, which is not the one being answered where others are behind that.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
        for callback in tuple(self._hang_up):
            callback()

    def on_headers_complete(self) -> None:
        """HTTP/1, and exactly one sane Host with 1.1 (RFC 9112 3.2); raising makes the parser refuse the request."""
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
            self.expect_100_continue = False  # which knows no 100 (RFC 9110 10.1.1)
        scope: Any = self.scope
        super().on_headers_complete()
        if self.pipeline:
            self.flow.resume_reading()  # the server has paused, whatever it is that waits
        # What comes behind the body are trailers, which are no headers of this request (RFC 9110 6.5.1).
        self.headers = []
        self._fed = 0
        self._parsing = "body"
        self._stop_timer()
        self._extend(scope)

    def _extend(self, scope: Any) -> None:
        # Nothing here may lead back to the cycle, which holds the scope: the collector would have to find both.
        scope["extensions"] = {"hang_up": self._hang_up, "body": self._body, "respond": self._respond}
        if self._first_byte:
            if self._running is self.cycle:  # or the time is that of the request before it
                scope["extensions"]["first_byte"] = max(self._first_byte, self._idle_since)
            self._first_byte = 0.0

    def _body(self) -> bytes | None:
        """The whole body, where `receive` would not wait for any of it."""
        cycle = self._running
        assert cycle is not None
        if cycle.more_body or cycle.disconnected:
            return None
        self.flow.resume_reading()
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    async def _respond(self, head: bytes, body: list[bytes], size: int, until: float, *, last: bool = False) -> None:
        """Does what `send` does with a response that is complete and has a content-length, `size`. Waits until the
        caller has taken it, but for what a transport buffers without saying so (64 KiB, as much as reading takes).
        `last` makes it the last on its connection. Raises `TimeoutError` if it was not taken by `until`, on the event
        loop's clock, or the server waits no longer: then the connection was ended."""
        cycle = self._running
        assert cycle is not None
        if self.flow.write_paused and not cycle.disconnected:
            await self._take(until)
        if cycle.disconnected:
            return
        if last:
            cycle.keep_alive = False
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        head += head_end(int(time.time()), cycle.keep_alive)
        self._outbox.put(self.transport, head, body, size, close=not cycle.keep_alive)
        if len(self.tasks) == 1 or not cycle.keep_alive:
            # There is nobody else to wait for; or nothing may begin behind this one.
            self._outbox.flush()
        cycle.response_complete = True
        cycle.message_event.set()
        # A request behind this one begins in a turn of its own: its response cannot be written before this one's.
        cycle.on_response()
        if self.flow.write_paused:
            await self._take(until)

    async def _take(self, until: float) -> None:
        """Waits until the caller has taken what was written, or is gone. At `until`, or when the server no longer
        waits, ends the connection and raises `TimeoutError`."""
        try:
            async with asyncio.timeout_at(until):
                await self.flow.drain()
        except (TimeoutError, asyncio.CancelledError):
            self.transport.abort()
            await self.flow.drain()  # which its loss ends
            raise TimeoutError from None

    # --- keep-alive: a timer that looks how long it has been idle, in place of a new one for every request ------

    def on_response_complete(self) -> None:
        """As the server does it, but for the timer."""
        self.server_state.total_requests += 1
        self._idle_since = self.loop.time()
        if not self.transport.is_closing():
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            self._parse_on()
            self.flow.resume_reading()
        elif not self.transport.get_write_buffer_size():
            return
        if self.timeout_keep_alive_task is None:
            self._look_again_in(self.timeout_keep_alive)

    def _look_again_in(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Ends a connection that is idle, and one whose caller takes nothing of what is written."""
        self.timeout_keep_alive_task = None
        untaken = self._look()
        if untaken[0]:
            if untaken == self._untaken:
                self.transport.abort()
            else:
                self._untaken = untaken
                self._look_again_in(self.timeout_keep_alive)
            return
        if self._head or not (self.cycle is None or self.cycle.response_complete):
            return  # not idle: the next response begins anew
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._look_again_in(left)
        else:
            super().timeout_keep_alive_handler()

    def _look(self) -> tuple[int, int, float]:
        """What `_untaken` keeps, as it is now."""
        return self.transport.get_write_buffer_size(), _unsent(self.transport), self._idle_since

    def _unset_keepalive_if_required(self) -> None:
        """Does nothing: the timer stays, whatever arrives."""

    def shutdown(self) -> None:
        """As the server does it; and a caller that takes nothing is not waited for as long as usual."""
        self._outbox.flush()
        super().shutdown()
        super()._unset_keepalive_if_required()
        self.timeout_keep_alive = SHUTDOWN_STALL_TIMEOUT
        self._untaken = self._look()
        if self._untaken[0]:
            self._look_again_in(SHUTDOWN_STALL_TIMEOUT)

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
        self.flow.resume_reading()  # held for a big body; a caller who hangs up is to be noticed

    def _unsupported_upgrade_warning(self) -> None:
        """CONNECT, or an offer pipelined behind another request: what follows cannot be told apart."""
        self.send_400_response("This server switches to no other protocol.")

    def send_400_response(self, msg: str) -> None:
        self._outbox.flush()
        running = self._running
        if running is not None and not (running.response_complete or running.more_body or running.disconnected):
            # What is wrong came behind a request that is being answered, whose caller would take this for the answer.
            running.keep_alive = False
            self.pipeline.clear()
            self._unparsed.clear()
            return
        self._refused()
        body = error_body(InvalidRequest(msg, code="invalid_http"))
        # Between requests the scope is that of the one before; of a broken head it is as much as was parsed.
        own = dict(self.scope["headers"]) if self._parsing else {}
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"x-request-id: %b\r\n%b%b" % (len(body), request_id(own), head_end(int(time.time()), False), body)
        )
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # or its answer would be written to a connection that is closed
            self.cycle.message_event.set()
        self.pipeline.clear()
        self._unparsed.clear()
        self.transport.close()
