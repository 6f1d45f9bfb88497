import asyncio
import logging
import os
import select
import shlex
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import orjson
import pytest

from app import logs
from app.logs import Messages, Output, RequestLine, RequestLog


class Taker:
    """A log that accepts `room` bytes of each write."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.room: int | None = None
        self.error: OSError | None = None

    def __call__(self, data: bytes) -> int:
        if self.error:
            raise self.error
        taken = data if self.room is None else data[: self.room]
        self.written.append(taken)
        return len(taken)

    @property
    def lines(self) -> list[bytes]:
        return b"".join(self.written).splitlines()


def told(inputs: int = 1, client: str = "me", error: str | None = None, request_id: bytes = b"req_1") -> RequestLine:
    return RequestLine(request_id, client, "plain/name-1", 200, error, inputs, cached=0, calls=1, ms=1.5)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        os.close(end)


async def test_a_text_line_is_what_a_shell_and_a_reader_of_logfmt_take_it_for() -> None:
    taker = Taker()
    log = RequestLog("text", taker)
    odd = 'a "b" = c\\ d\n\te ü'
    log.line(told(client=odd, request_id=b'a="b"'))
    log.flush()
    [line] = taker.lines
    fields = dict(part.split("=", 1) for part in shlex.split(line.decode().replace("\\n", "\n").replace("\\t", "\t")))
    written = datetime.fromisoformat(fields.pop("timestamp"))
    assert abs((datetime.now(UTC) - written).total_seconds()) < 60
    assert fields == {
        "level": "info", "event": "request", "request_id": 'a="b"', "client": odd, "model": "plain/name-1",
        "status": "200", "error": "", "inputs": "1", "cached": "0", "calls": "1", "ms": "1.5",
    }  # fmt: skip


async def test_a_json_line_is_an_object() -> None:
    taker = Taker()
    log = RequestLog("json", taker)
    log.line(told(client='a "b"\n'))
    log.flush()
    [line] = taker.lines
    fields = orjson.loads(line)
    del fields["timestamp"]
    assert fields == {
        "level": "info", "event": "request", "request_id": "req_1", "client": 'a "b"\n', "model": "plain/name-1",
        "status": 200, "error": None, "inputs": 1, "cached": 0, "calls": 1, "ms": 1.5,
    }  # fmt: skip


async def test_the_lines_of_one_turn_are_written_together_at_its_end() -> None:
    taker = Taker()
    log = RequestLog("text", taker)
    for number in range(5):
        log.line(told(number))
    assert not taker.written
    await asyncio.sleep(0)
    assert len(taker.written) == 1
    assert [line.split()[-4] for line in taker.lines] == [b"inputs=%d" % number for number in range(5)]


async def test_a_stuck_log_holds_nobody_up_and_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "RETRY_INTERVAL", 0.0)
    taker = Taker()
    log = RequestLog("text", taker)
    taker.room = 10
    log.line(told(1))
    log.flush()
    log.line(told(2))
    taker.room = None
    async with asyncio.timeout(10):
        while len(taker.lines) < 2:
            await asyncio.sleep(0)
    assert [line.split()[-4] for line in taker.lines] == [b"inputs=1", b"inputs=2"]


@pytest.mark.parametrize("often", [True, False], ids=["tried with each line", "tried once"])
@pytest.mark.parametrize("error", [None, OSError(28, "No space left on device"), BrokenPipeError()])
async def test_what_a_log_does_not_take_is_dropped_in_the_end_and_counted(
    error: OSError | None, monkeypatch: pytest.MonkeyPatch, often: bool
) -> None:
    monkeypatch.setattr(logs, "MAX_BACKLOG", 1000)
    taker = Taker()
    taker.room, taker.error = 0, error
    log = RequestLog("text", taker)
    drops: list[int] = []
    log.on_drop = lambda: drops.append(1)
    for number in range(100):
        log.line(told(number))
        if often or not number:
            log.flush()
    taker.room = taker.error = None
    log.flush()
    log.line(told(100))
    log.flush()
    kept = len(taker.lines) - 1
    assert 5 < kept < 50
    last = taker.lines[-1].split()
    assert b"inputs=100" in last
    assert last[-1] == b"lines_dropped_before=%d" % (100 - kept)
    assert len(drops) == 100 - kept


def _message(text: str, *values: object) -> logging.LogRecord:
    return logging.LogRecord("app", logging.WARNING, "", 0, text, values, None)


def test_no_message_has_a_terminal_do_anything() -> None:
    """Messages contain text from upstreams."""
    said = "up: \x1b[31mred\r\nlevel=info \x9b2J \x7f \u2028next \u00fcber \u4e2d\u6587"
    line = logs.formatter("text").format(_message("%s", said))
    assert r"up: \x1b[31mred\r\nlevel=info \x9b2J \x7f \u2028next über 中文" in line
    assert line.isprintable()


@pytest.mark.parametrize("form", ["text", "json"])
async def test_nor_has_a_line_of_a_request_or_one_in_json(form: logs.Format) -> None:
    """Models' names come from upstreams, and a name without spaces is not quoted."""
    odd = "a\x7f\x85b\x9b31m\u2028c\u202egnp\U000e0001\u4e2d"
    taker = Taker()
    log = RequestLog(form, taker)
    log.line(told(client=odd))
    log.flush()
    [line] = b"".join(taker.written).decode().removesuffix("\n").split("\n")
    message = logs.formatter("json").format(_message("%s", odd))
    assert line.isprintable()
    assert message.isprintable()
    assert orjson.loads(message)["event"] == odd
    assert orjson.loads(line if form == "json" else "{}").get("client", odd) == odd


def test_messages_that_a_log_does_not_take_wait_and_what_comes_on_top_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs, "MAX_BACKLOG", 1000)
    taker = Taker()
    taker.error = OSError(28, "No space left on device")
    messages = Messages(taker)
    for number in range(200):
        messages.handle(_message("message %03d", number))
    taker.error = None
    messages.handle(_message("dropped, for it still looks stuck"))
    messages.flush()
    messages.handle(_message("the last"))
    *kept, dropped, last = taker.lines
    assert kept == [b"message %03d" % number for number in range(len(kept))]
    assert 50 < len(kept) < 150
    assert dropped == b"%d messages dropped before this one" % (201 - len(kept))
    assert last == b"the last"


def test_a_message_that_waits_is_written_without_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "RETRY_INTERVAL", 0.0)
    written = threading.Event()
    answers = iter([0, 3, 0])

    def write(data: bytes) -> int:
        taken = next(answers, len(data))
        if taken == len(data):
            written.set()
        return taken

    Messages(write).handle(_message("in the end"))
    assert written.wait(10)


def test_a_message_that_cannot_be_put_together_fails_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    taker = Taker()
    messages = Messages(taker)
    messages.handle(_message("%d", "no number"))
    messages.handle(_message("the next"))
    assert taker.lines == [b"the next"]
    assert "no number" in capsys.readouterr().err


async def test_a_full_pipe_is_never_waited_for(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    output = Output(writer)
    line = b"x" * 99 + b"\n"
    sent = taken = 0
    while (taken := output(line * 1000)) == 100_000:
        sent += taken
    sent += taken
    assert output(line) == 0
    received = b""
    while select.select([reader], [], [], 0)[0]:
        received += os.read(reader, 65536)
    assert len(received) == sent
    assert set(received.splitlines()) == {line.strip()}, "whole lines"
    assert output(line) == 100


async def test_a_line_longer_than_a_pipe_takes_at_once_is_written_all_the_same(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    assert Output(writer)(b"x" * 10_000 + b"\n") == 10_001
    assert os.read(reader, 20_000) == b"x" * 10_000 + b"\n"
