"""Logging: one line per request and the program's own messages, as text or JSON, on standard error."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import orjson
import structlog
from msgspec import Struct
from msgspec.structs import asdict

Format = Literal["text", "json"]

MAX_BACKLOG = 2**20
"""Bytes of request lines that may wait for a log that is stuck."""
RETRY_INTERVAL = 0.25
"""Seconds after which a log that was stuck is tried again."""

_PLAIN = re.compile(r'[^\s"=\x00-\x1f\x7f]+').fullmatch
"""What logfmt takes without quotes."""
_QUOTE, _EQUALS = b'"='
"""As numbers: looking for `bytes` within `bytes` raises and catches an exception inside, each time."""
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]").sub
_MILLISECONDS = tuple(b".%03dZ" % number for number in range(1000))
"""How a timestamp ends: looking it up is quicker than formatting it."""


class RequestLine(Struct):
    """What the log says of a request, in this order: names and numbers, never texts or keys."""

    request_id: bytes
    """Printable ASCII without spaces."""
    client: str
    model: str
    status: int
    error: str | None
    inputs: int
    cached: int
    calls: int
    ms: float


class RequestLog:
    """The request lines. They are written together at the end of the event loop's turn, so that a busy gateway
    writes once for many.

    `write` takes bytes and says how many it has taken. A log that is stuck or broken never holds up a request
    nor fails one: lines wait, up to `MAX_BACKLOG`, and what comes on top is dropped and counted.
    """

    def __init__(self, form: Format, write: Callable[[bytes], int]) -> None:
        self._line = _json if form == "json" else _logfmt
        self._write = write
        self._waiting: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self.on_drop: Callable[[], None] = lambda: None
        """Told of each line that is dropped."""
        self._flush_planned = False
        self._second, self._date = 0, b""

    def line(self, told: RequestLine) -> None:
        """Must be called within the event loop."""
        if self._size > MAX_BACKLOG:
            self._dropped += 1
            self.on_drop()
            return
        line = self._line(self._now(), told, self._dropped)
        self._dropped = 0
        self._waiting.append(line)
        self._size += len(line)
        if not self._flush_planned:
            self._flush_planned = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Writes what waits, as far as `write` takes it; the rest soon."""
        self._flush_planned = False
        waiting = b"".join(self._waiting)
        left = waiting[_taken(self._write, waiting) :]
        self._waiting, self._size = [left] if left else [], len(left)
        if left:
            self._flush_planned = True
            asyncio.get_running_loop().call_later(RETRY_INTERVAL, self.flush)

    def _now(self) -> bytes:
        """UTC, to the millisecond; the date is put together once a second."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()
        return self._date + _MILLISECONDS[int((now - second) * 1000)]


class Output:
    """Writes to a file descriptor, such as standard error, and never waits for it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def __call__(self, data: bytes) -> int:
        """How much of it was written. Raises `OSError`."""
        taken = 0
        while taken < len(data):
            # A pipe that is ready takes this much without waiting, and in one piece: the lines of several
            # workers do not run into each other (POSIX, write()).
            end = data.rfind(b"\n", taken, taken + select.PIPE_BUF) + 1 or taken + select.PIPE_BUF
            if not self._poll.poll(0):
                break
            taken += os.write(self._descriptor, data[taken:end])
        return taken


class Messages(logging.Handler):
    """The program's own messages, from any thread, each written at once.

    A log that is stuck or broken holds up nobody here either: messages wait, up to `MAX_BACKLOG`, and are tried
    again until they are taken. What comes on top is dropped, and counted in the next message that is not.
    """

    def __init__(self, write: Callable[[bytes], int]) -> None:
        super().__init__()
        self._write = write
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._retry: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """To be called with the handler's lock, as `handle` does."""
        if self._size > MAX_BACKLOG:
            self._dropped += 1
            return
        try:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
        except Exception:  # whatever is wrong with a message is not to fail what it tells of
            self.handleError(record)
            return
        if self._dropped:
            self._dropped, count = 0, self._dropped
            text = "%d messages dropped before this one"
            self.handle(logging.LogRecord(__name__, logging.WARNING, "", 0, text, (count,), None))
        self._waiting.append(line)
        self._size += len(line)
        self.flush()

    def flush(self) -> None:
        """Writes what waits, as far as `write` takes it; the rest soon."""
        self.acquire()
        try:
            while self._waiting:
                line = self._waiting.popleft()
                taken = _taken(self._write, line)
                self._size -= taken
                if taken < len(line):
                    self._waiting.appendleft(line[taken:])
                    self._try_again()
                    return
        finally:
            self.release()

    def _try_again(self) -> None:
        if self._retry is None or not self._retry.is_alive() or self._retry is threading.current_thread():
            self._retry = threading.Timer(RETRY_INTERVAL, self.flush)
            self._retry.daemon = True  # or a log that stays stuck would keep the process from ending
            self._retry.start()


def request_log(form: Format, level: int = logging.INFO) -> RequestLog:
    """The request lines on standard error, or nowhere at a `level` above theirs."""
    return RequestLog(form, Output(sys.stderr.fileno()) if level <= logging.INFO else len)


def _taken(write: Callable[[bytes], int], data: bytes) -> int:
    try:
        return write(data)
    except OSError:  # a full disk, a reader that is gone
        return 0


def _json(timestamp: bytes, told: RequestLine, dropped: int) -> bytes:
    whole = {"timestamp": timestamp.decode(), "level": "info", "event": "request", **asdict(told)}
    whole |= {"request_id": told.request_id.decode(), "ms": round(told.ms, 1)}
    if dropped:
        whole["lines_dropped_before"] = dropped
    return orjson.dumps(whole, option=orjson.OPT_APPEND_NEWLINE)


def _logfmt(timestamp: bytes, told: RequestLine, dropped: int) -> bytes:
    # In bytes and whole numbers, as the response is: code that a request needs anyway is at hand (bench/README.md).
    request_id, tenths = told.request_id, round(told.ms * 10)
    if _QUOTE in request_id or _EQUALS in request_id:
        request_id = orjson.dumps(request_id.decode())
    return (
        b"timestamp=%b level=info event=request request_id=%b client=%b model=%b status=%d error=%b inputs=%d cached=%d"
        b" calls=%d ms=%d.%d%b\n"
    ) % (
        timestamp,
        request_id,
        _shown(told.client),
        _shown(told.model),
        told.status,
        _shown(told.error) if told.error else b"",
        told.inputs,
        told.cached,
        told.calls,
        tenths // 10,
        tenths % 10,
        b" lines_dropped_before=%d" % dropped if dropped else b"",
    )


@lru_cache(maxsize=1024)
def _shown(text: str) -> bytes:
    return text.encode() if _PLAIN(text) else orjson.dumps(text)


def configure(form: Format, level: str) -> None:
    """The program's own messages through the standard library's root logger, in the same form.

    For the command line only: a process has one root logger.
    """
    handler = Messages(Output(sys.stderr.fileno()))
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It tells of its own start and stop, which the lines before and after tell better.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def formatter(form: Format) -> logging.Formatter:
    """A message to a line, in which nothing is left that a terminal would act on."""
    chain: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    renderers: list[structlog.typing.Processor]
    if form == "json":
        renderers = [structlog.processors.JSONRenderer(serializer=lambda data, **_: orjson.dumps(data).decode())]
    else:
        renderers = [structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]), _printable]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=chain,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            *renderers,
        ],
    )


def _printable(_logger: object, _method: str, line: Any) -> str:
    return _CONTROLS(lambda found: found[0].encode("unicode_escape").decode(), line)
