"""Sends cases to a served gateway, and checks its answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import yaml

from tests.api.support import RawReply, Wire
from tests.fuzz.cases import KEY, Case
from tests.processes import serving

CONFIG: Mapping[str, Any] = {
    "server": {"max_body": "64KiB", "max_inputs": 64},
    "auth": {"keys": {"fuzz": {"key": KEY}}},
    "upstreams": {"lexical": {"type": "lexical"}},
}
_TROUBLE = re.compile(r"Traceback|Exception in|never retrieved|level=(error|critical)")


@dataclass
class Served:
    """A gateway in a process of its own."""

    url: str
    log: Path

    def troubles(self) -> list[str]:
        """Lines of its log that show a bug."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if _TROUBLE.search(line)]


@contextmanager
def served(directory: Path) -> Iterator[Served]:
    """Serves the lexical upstream; the gateway must still be running at the end."""
    (directory / "gateway.yaml").write_text(yaml.safe_dump(dict(CONFIG)))
    with serving(directory, "--config", "gateway.yaml") as (url, process):
        yield Served(url, directory / "log")
        assert process.poll() is None, "the gateway has ended"


@dataclass
class Face:
    """Sends cases, over one connection for as long as it stays open."""

    url: str
    statuses: Counter[str] = field(default_factory=Counter)
    _wire: Wire | None = None

    def close(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire._file.close()
            wire.socket.close()

    def throw(self, case: Case) -> None:
        """Sends a case and checks everything that comes back."""
        try:
            if case.whole:
                self._throw_whole(case)
            else:
                self._throw_broken(case)
        except AssertionError as error:
            self.close()
            raise AssertionError(f"{case.data[:2000]!r} was answered with {error}") from error
        except BaseException:
            self.close()  # the next case must not read what is left of this one's answer
            raise

    def _throw_whole(self, case: Case) -> None:
        if self._wire is None:
            self._wire = Wire(self.url)
        with suppress(BrokenPipeError, ConnectionResetError):  # it may be refused before all of it is sent
            self._wire.send(case.data)
        reply = self._wire.reply(head_only=case.head_only)
        while reply is not None and reply.status_code == 100:
            reply = self._wire.reply(head_only=case.head_only)
        assert reply is not None, "a whole request was not answered"
        self.statuses[str(reply.status_code)] += 1
        check(reply, head_only=case.head_only)
        if reply.headers.get("connection") == "close":
            self.close()

    def _throw_broken(self, case: Case) -> None:
        """Sends it on a connection of its own, then shuts down our side."""
        wire = Wire(self.url)
        received = b""
        try:
            with suppress(OSError):
                wire.send(case.data)
            wire.done()
            with suppress(ConnectionResetError):  # the server may not have read all we sent
                while piece := wire.socket.recv(65536):
                    received += piece
        finally:
            wire._file.close()
            wire.socket.close()
        replies = list(_replies(received))
        self.statuses.update(f"broken {reply.status_code}" for reply in replies)
        if not replies:
            self.statuses["broken, unanswered"] += 1
        for reply in replies:
            check(reply, head_only=not reply.content)


def _replies(received: bytes) -> Iterator[RawReply]:
    """The whole replies in what a server sent, which may be cut off anywhere."""
    while b"\r\n\r\n" in received:
        head, received = received.split(b"\r\n\r\n", 1)
        first, *lines = head.decode("latin-1").split("\r\n")
        assert first.startswith("HTTP/1.1 "), first
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = 0 if received.startswith(b"HTTP/1.1 ") else int(headers.get("content-length", 0))  # HEAD gets no body
        if headers.get("transfer-encoding") == "chunked" or len(received) < size:
            return
        yield RawReply(int(first.split(" ")[1]), headers, received[:size])
        received = received[size:]


def check(reply: RawReply, *, head_only: bool) -> None:
    """Raises `AssertionError` unless it is an answer, or a caller's error in OpenAI's shape."""
    shown = f"{reply.status_code} {reply.content[:500]!r}"
    assert reply.status_code < 500, shown
    if head_only:
        return
    if reply.status_code >= 400:
        check_error(reply.content, reply.headers)
    elif reply.headers.get("content-type") == "application/json":
        answer = orjson.loads(reply.content)
        if answer.get("object") == "list" and "usage" in answer:
            assert [row["index"] for row in answer["data"]] == list(range(len(answer["data"]))), shown
            assert all(row["embedding"] for row in answer["data"]), shown
            assert reply.headers["x-request-id"]


def check_error(content: bytes, headers: Mapping[str, str]) -> None:
    shown = repr(content[:500])
    assert headers["content-type"] == "application/json", shown
    body = orjson.loads(content)
    assert list(body) == ["error"], shown
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, shown
    assert isinstance(error["message"], str), shown
    assert error["message"], shown
    assert error["type"] == "invalid_request_error", shown
    assert isinstance(error["code"], str), shown
    assert error["param"] is None or isinstance(error["param"], str), shown
