"""Logging: one line per request, and the program's own messages, as text or JSON on standard error."""

from __future__ import annotations

import asyncio
import json
import logging
import math
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
"""Bytes that may wait for an output that is stuck."""
RETRY_INTERVAL = 0.25
"""Seconds between attempts to write to an output that is stuck."""

_PLAIN = re.compile(r'[^\s"=]+').fullmatch
"""Values that logfmt writes without quotes, if they are printable."""
_QUOTE, _EQUALS = b'"='
"""As integers: `bytes in bytes` raises and catches an exception internally, each time."""
_MILLISECONDS = tuple(b".%03dZ" % number for number in range(1000))
"""The ends of timestamps: looking one up is quicker than formatting it."""


LOG_INTERVAL = 60.0
"""Seconds between two lines that say the same of what may repeat without end."""


class Seldom:
    """Limits lines that repeat to one of each kind in `LOG_INTERVAL`. `now` returns a monotonic clock's seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._next: dict[object, float] = {}

    def __call__(self, kind: object = None) -> bool:
        """Whether to log a line of this kind now. If so, it counts as logged."""
        now = self._now()
        if now < self._next.get(kind, -math.inf):
            return False
        self._next[kind] = now + LOG_INTERVAL
        return True


class RequestLine(Struct):
    """The fields logged for a request, in this order: names and numbers, never texts or keys."""

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
    """The request lines. All lines of one turn of the event loop are written together, so that a busy gateway writes
    once for many.

    `write` takes bytes and returns how many it wrote. An output that is stuck or broken never delays or fails a
    request: lines wait, up to `MAX_BACKLOG`, and any beyond that are dropped and counted.
    """

    def __init__(self, form: Format, write: Callable[[bytes], int]) -> None:
        self._format = _json if form == "json" else _logfmt
        self._write = write
        self._waiting: list[bytes] = []
        self._size = 0
        self._dropped = 0
        self.on_drop: Callable[[], None] = lambda: None
        """Called for each line that is dropped."""
        self._flush_scheduled = False
        self._second, self._date = 0, b""

    def line(self, fields: RequestLine) -> None:
        """Logs a request. Must be called within the event loop."""
        if self._size > MAX_BACKLOG:
            self._dropped += 1
            self.on_drop()
            return
        line = self._format(self._now(), fields, self._dropped)
        self._dropped = 0
        self._waiting.append(line)
        self._size += len(line)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Writes as much of the waiting lines as `write` takes, and retries the rest soon."""
        self._flush_scheduled = False
        waiting = b"".join(self._waiting)
        left = waiting[_try_write(self._write, waiting) :]
        self._waiting, self._size = [left] if left else [], len(left)
        if left:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_later(RETRY_INTERVAL, self.flush)

    def _now(self) -> bytes:
        """The time in UTC, to the millisecond. The part down to the second is formatted once a second."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()
        return self._date + _MILLISECONDS[int((now - second) * 1000)]


class Output:
    """Writes to a file descriptor, such as standard error, without ever blocking on it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def __call__(self, data: bytes) -> int:
        """Returns the number of bytes written. Raises `OSError`."""
        written = 0
        while written < len(data):
            # A pipe that is ready takes PIPE_BUF bytes without blocking and atomically, so that the lines of several
            # workers are not interleaved (POSIX, write()).
            end = data.rfind(b"\n", written, written + select.PIPE_BUF) + 1 or written + select.PIPE_BUF
            if not self._poll.poll(0):
                break
            written += os.write(self._descriptor, data[written:end])
        return written


class Messages(logging.Handler):
    """Handles the program's own messages, from any thread, and writes each at once.

    An output that is stuck or broken delays nobody here either: messages wait, up to `MAX_BACKLOG`, and are retried
    until written. Any beyond that are dropped; the next message that is not is preceded by their number.
    """

    def __init__(self, write: Callable[[bytes], int]) -> None:
        super().__init__()
        self._write = write
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._retry: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Must be called with the handler's lock held, as `handle` does."""
        if self._size > MAX_BACKLOG:
            self._dropped += 1
            return
        try:
            line = (self.format(record) + "\n").encode(errors="backslashreplace")
        except Exception:  # a faulty message must not fail the code that logs it
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
        """Writes as much of the waiting messages as `write` takes, and retries the rest soon."""
        self.acquire()
        try:
            while self._waiting:
                line = self._waiting.popleft()
                written = _try_write(self._write, line)
                self._size -= written
                if written < len(line):
                    self._waiting.appendleft(line[written:])
                    self._schedule_retry()
                    return
        finally:
            self.release()

    def _schedule_retry(self) -> None:
        if self._retry is None or not self._retry.is_alive() or self._retry is threading.current_thread():
            self._retry = threading.Timer(RETRY_INTERVAL, self.flush)
            self._retry.daemon = True  # otherwise a stuck output would keep the process alive
            self._retry.start()


def request_log(form: Format, level: int = logging.INFO) -> RequestLog:
    """A request log on standard error; it discards its lines if `level` is above INFO, which is theirs."""
    return RequestLog(form, Output(sys.stderr.fileno()) if level <= logging.INFO else len)


def _try_write(write: Callable[[bytes], int], data: bytes) -> int:
    try:
        return write(data)
    except OSError:  # a full disk, or a reader that has gone
        return 0


def _json(timestamp: bytes, fields: RequestLine, dropped: int) -> bytes:
    record = {"timestamp": timestamp.decode(), "level": "info", "event": "request", **asdict(fields)}
    record |= {"request_id": fields.request_id.decode(), "ms": round(fields.ms, 1)}
    if dropped:
        record["lines_dropped_before"] = dropped
    return _printable_json(record) + b"\n"


def _logfmt(timestamp: bytes, fields: RequestLine, dropped: int) -> bytes:
    # In bytes and integers, like the response: code that a request needs anyway is in the CPU cache (bench/README.md).
    request_id, tenths = fields.request_id, round(fields.ms * 10)
    if _QUOTE in request_id or _EQUALS in request_id:
        request_id = orjson.dumps(request_id.decode())
    return (
        b"timestamp=%b level=info event=request request_id=%b client=%b model=%b status=%d error=%b inputs=%d cached=%d"
        b" calls=%d ms=%d.%d%b\n"
    ) % (
        timestamp,
        request_id,
        _logfmt_value(fields.client),
        _logfmt_value(fields.model),
        fields.status,
        _logfmt_value(fields.error) if fields.error else b"",
        fields.inputs,
        fields.cached,
        fields.calls,
        tenths // 10,
        tenths % 10,
        b" lines_dropped_before=%d" % dropped if dropped else b"",
    )


@lru_cache(maxsize=1024)
def _logfmt_value(text: str) -> bytes:
    return text.encode() if _PLAIN(text) and text.isprintable() else _printable_json(text)


def _printable_json(value: Any) -> bytes:
    """The value as JSON. What does not print (control characters, line separators, changes of direction) is escaped:
    names come from upstreams."""
    line = orjson.dumps(value)
    if line.isascii() and b"\x7f" not in line:  # nearly always
        return line
    text = line.decode()
    if text.isprintable():
        return line
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text).encode()


def configure(form: Format, level: str) -> None:
    """Sends the program's own messages through the standard library's root logger, in the same form.

    For the command line only, since a process has one root logger.
    """
    handler = Messages(Output(sys.stderr.fileno()))
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # uvicorn reports its start and stop at INFO; the gateway's own lines before and after say it better. It also logs
    # every invalid request, of which a wrongly set up health check sends one a second: `app.http.invalid` says more.
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.setLevel(logging.WARNING)
    uvicorn_log.addFilter(lambda record: record.msg != "Invalid HTTP request received.")


def formatter(form: Format) -> logging.Formatter:
    """Formats a message as one line, with what does not print escaped, so that no terminal acts on it."""
    chain: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    renderers: list[structlog.typing.Processor]
    if form == "json":
        renderers = [structlog.processors.JSONRenderer(serializer=lambda data, **_: _printable_json(data).decode())]
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
    return printable(line)


def printable(text: str) -> str:
    """The text with what does not print escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
