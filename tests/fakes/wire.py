"""HTTP/1.1 on a socket, by hand, to be able to do what a correct server would not.

Knows nothing of embeddings or vendors. Framing follows RFC 9112.
"""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import orjson


@dataclass(eq=False)
class Request:
    """A request as read; header names are in lower case, the path is decoded."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    connection: int = 0
    target: str = ""

    @cached_property
    def json(self) -> Any:
        """The body parsed strictly (UTF-8, no NaN), or None if it is not JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None

    @property
    def bearer(self) -> str | None:
        """The token of ``Authorization: Bearer``, or None."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token.strip() or None if scheme.lower() == "bearer" else None


@dataclass
class Reply:
    """A complete answer; `headers` may override Content-Type."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def head(self, framing: str = "", *, close: bool = False) -> bytes:
        """Return the status line and the headers; `framing` defaults to the true length."""
        lines = [f"HTTP/1.1 {self.status} {_reason(self.status)}"]
        named = {name.lower() for name in self.headers}
        if "content-type" not in named:
            lines.append("Content-Type: application/json")
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if "content-length" not in named:
            lines.append(framing or f"Content-Length: {len(self.body)}")
        if close:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def json_reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """Return a reply whose body is `content` as JSON; numpy arrays become arrays of numbers."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Reply(status, body, dict(headers or {}))


def body_bytes(body: str | bytes | Mapping[str, Any] | list[Any]) -> bytes:
    """Return text as UTF-8, bytes as they are, anything else as JSON."""
    if isinstance(body, bytes):
        return body
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


class Reader(asyncio.StreamReader):
    """A stream reader that knows when the peer has gone, even if nobody reads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=1 << 20, loop=loop)
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.gone.set()


class Connection:
    """One accepted socket: reads requests, sends replies, and misbehaves when told to."""

    def __init__(self, reader: Reader, writer: asyncio.StreamWriter, number: int) -> None:
        self._reader = reader
        self._writer = writer
        self.number = number
        self.gone = reader.gone
        self.answered = 0
        """Whole replies sent so far; more than 0 once a keep-alive connection is reused."""

    async def next_request(self) -> Request | None:
        """Return the next request, or None when the peer closes instead of sending one."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        first, *rest = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _version = first.split(" ", 2)
        headers: dict[str, str] = {}
        for line in rest:
            name, _, value = line.partition(":")
            key = name.strip().lower()
            headers[key] = f"{headers[key]}, {value.strip()}" if key in headers else value.strip()
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        body = await self._body(headers)
        path = unquote(parts.path)
        return Request(method, path, query, headers, body, self.number, target)

    async def _body(self, headers: Mapping[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", "").lower():
            return await self._reader.readexactly(int(headers.get("content-length", "0")))
        body = b""
        while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readuntil(b"\r\n")  # no client we use sends trailers
        return body

    async def wait_for_byte(self) -> None:
        """Wait until the peer sends anything more on this connection, or leaves."""
        await self._reader.read(1)

    async def send(self, reply: Reply, *, close: bool = False, head_only: bool = False) -> None:
        """Send a whole reply; with `close`, say so and leave closing to the caller."""
        self._writer.write(reply.head(close=close) + (b"" if head_only else reply.body))
        self.answered += 1
        await self._writer.drain()

    async def write(self, data: bytes) -> None:
        """Send these bytes, whatever the state of the exchange."""
        self._writer.write(data)
        await self._writer.drain()

    def reset(self) -> None:
        """End with RST instead of FIN, as a killed process behind a firewall does."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def abort(self) -> None:
        """Drop the connection without sending what is still buffered."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close in order (FIN), after everything written has been sent."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):  # the peer may close first
            await self._writer.wait_closed()


def listen(port: int) -> socket.socket:
    """Return a listening loopback socket; port 0 takes a free one."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(2048)
    return sock


def unused_url() -> str:
    """Return the URL of a loopback port where nothing listens: connecting is refused."""
    with listen(0) as sock:
        port: int = sock.getsockname()[1]
    return f"http://127.0.0.1:{port}"
