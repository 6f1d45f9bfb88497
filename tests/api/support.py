"""Shared by the HTTP API's tests: one upstream's configuration, the error shape, and HTTP by hand."""

from __future__ import annotations

import asyncio
import shlex
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import httpx
import orjson

from tests.fakes import FakeUpstream
from tests.harness import Running

MODEL = "text-embedding-3-small"
OTHER_MODEL = "text-embedding-3-large"
FIXED_LENGTH = "text-embedding-ada-002"
"""A model with a single length."""

PATIENCE = 10.0
"""Seconds after which a missing answer will not come."""


def config(fake: FakeUpstream, /, upstream: Mapping[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """A gateway with one OpenAI-like upstream, named `up`, and no cache unless `sections` say otherwise."""
    up = {"type": "openai", "api_key": "sk-fake", "base_url": f"{fake.url}/v1", **(upstream or {})}
    return {"upstreams": {"up": up}, "cache": {"memory": None}, **sections}


def error_of(response: httpx.Response | RawReply) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's shape and a request id."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = orjson.loads(response.content)
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    return error


# --- HTTP by hand -----------------------------------------------------------------------------------------


@dataclass
class RawReply:
    """One response as it was on the wire. Of a header sent twice, the last value counts."""

    status_code: int
    headers: dict[str, str]
    content: bytes


class Wire:
    """A connection on which a test writes what it likes."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self.socket = socket.create_connection((address.hostname, address.port), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file: BinaryIO = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self, *, head_only: bool = False) -> RawReply | None:
        """The next response, or None if the server has closed the connection."""
        try:
            line = self._file.readline()
        except ConnectionResetError:
            return None
        if not line:
            return None
        version, status, *_ = line.split(b" ", 2)
        assert version == b"HTTP/1.1"
        headers: dict[str, str] = {}
        while (line := self._file.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        if head_only or status == b"100":
            return RawReply(int(status), headers, b"")
        if "content-length" in headers:
            return RawReply(int(status), headers, self._file.read(int(headers["content-length"])))
        if headers.get("transfer-encoding") == "chunked":
            return RawReply(int(status), headers, self._chunked())
        return RawReply(int(status), headers, self._file.read())

    def _chunked(self) -> bytes:
        content = b""
        while size := int(self._file.readline(), 16):
            content += self._file.read(size)
            self._file.readline()
        self._file.readline()
        return content

    def must_reply(self) -> RawReply:
        reply = self.reply()
        assert reply is not None, "the connection was closed without an answer"
        return reply

    def done(self) -> None:
        """Shuts down the sending side, so that the server stops waiting for a body it does not want."""
        with suppress(OSError):  # the connection may be gone
            self.socket.shutdown(socket.SHUT_WR)

    @property
    def closed(self) -> bool:
        """Whether the server closes the connection without another response."""
        self.done()
        return self.reply() is None


@contextmanager
def wire(url: str) -> Iterator[Wire]:
    connection = Wire(url)
    try:
        yield connection
    finally:
        connection._file.close()
        connection.socket.close()


def head(method: str, target: str, *headers: str) -> bytes:
    """The bytes of a request's head."""
    lines = [f"{method} {target} HTTP/1.1", "Host: gateway", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def post(body: object, *headers: str, target: str = "/v1/embeddings") -> bytes:
    """The bytes of a whole POST with a JSON body (bytes are sent as they are)."""
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    return head("POST", target, "Content-Type: application/json", f"Content-Length: {len(content)}", *headers) + content


def raw(url: str, data: bytes) -> RawReply | None:
    """The server's first answer to these bytes, on a connection of their own."""
    with wire(url) as connection:
        connection.send(data)
        return connection.reply()


# --- the gateway's state ----------------------------------------------------------------------------------


def settled(gateway: Running, condition: Callable[[], bool]) -> None:
    """Waits until `condition` holds, checking on every turn of the gateway's event loop."""

    async def watch() -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():  # no event tells of what tests wait for
                await asyncio.sleep(0)

    gateway.call(watch())


def log_lines(gateway: Running) -> list[dict[str, str]]:
    """The request log so far, one mapping per line; every line must be `key=value` pairs only."""
    lines = []
    for line in gateway.log.getvalue().splitlines():
        parts = shlex.split(line)
        assert all("=" in part for part in parts), line
        lines.append(dict(part.split("=", 1) for part in parts))
    return lines
