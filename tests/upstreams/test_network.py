"""The HTTP engine over real sockets: servers that answer byte by byte, too much, too little, too late or wrongly."""

from __future__ import annotations

import _thread
import asyncio
import random
import socket
import ssl
import threading
import time
import tracemalloc
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohappyeyeballs
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.errors import GatewayError, Overloaded, UpstreamInvalidResponse, UpstreamMisconfigured, UpstreamUnreachable
from app.types import WireReply, WireRequest
from app.upstreams import network as networks
from app.upstreams import resolver
from app.upstreams.connection import Connection, StaleConnection
from app.upstreams.network import NetworkEngine
from tests.clock import settle
from tests.harness import no_descriptors, no_threads

MOST = 100_000

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]


@dataclass
class Server:
    """The requests that a server received, and its connections."""

    port: int = 0
    connections: int = 0
    closed: int = 0
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def url(self, path: str = "/v1/embeddings", scheme: str = "http", host: str = "127.0.0.1") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


@asynccontextmanager
async def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Runs a server that reads whole requests and answers each with `answer`."""
    server = Server()
    tasks: set[asyncio.Task[None]] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(each[15:]) for each in head.split(b"\r\n") if each.startswith(b"content-length")), 0)
                server.heads.append(head)
                server.bodies.append(await reader.readexactly(length))
                await answer(reader, writer, head)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError, asyncio.CancelledError):
            pass  # cancelled when the server ends: asyncio's streams cannot handle a cancelled task
        finally:
            server.closed += 1
            writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await talk(reader, writer)
        tasks.discard(task)

    listener = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def says(*pieces: bytes, close: bool = False) -> Answer:
    """Answers with these pieces, each sent separately."""

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _head: bytes) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return answer


@asynccontextmanager
async def connected(proxy: str | None = None, connect_timeout: float = 5.0) -> AsyncIterator[NetworkEngine]:
    network = NetworkEngine(connect_timeout=connect_timeout, proxy=proxy)
    try:
        yield network
    finally:
        await network.aclose()


def post(
    url: str, body: bytes = b"{}", headers: Mapping[str, str] = MappingProxyType({}), most: int = MOST
) -> WireRequest:
    return WireRequest("POST", url, {"content-type": "application/json", **headers}, body, max_reply=most)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


on_each_loop = pytest.mark.parametrize(
    "runs_on", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


class Ahead(asyncio.SelectorEventLoop):
    """An event loop whose clock a test moves."""

    _moved = 0.0

    def time(self) -> float:
        return super().time() + self._moved

    def move(self, seconds: float) -> None:
        self._moved += seconds


def on_a_moved_clock(exchange: Callable[[Ahead], Coroutine[None, None, None]]) -> None:
    loop = Ahead()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(exchange(loop))


OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 5\r\n\r\n[1,2]"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\n[1,\r\n2\r\n2]\r\n0\r\n\r\n"
TO_THE_END = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n[1,2]"


async def test_a_request_is_whole_and_a_connection_is_used_again() -> None:
    async with serving(says(OK)) as server, connected() as network:
        for number in range(3):
            reply = await network.exchange(post(server.url("/a b?c=d"), b"[%d]" % number, {"authorization": "x"}))
            assert reply == WireReply(200, {"content-type": "application/json", "content-length": "5"}, b"[1,2]")
        assert server.connections == 1
        assert server.bodies == [b"[0]", b"[1]", b"[2]"]
        assert server.heads[0] == (
            b"POST /a%%20b?c=d HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n"
            b"authorization: x\r\ncontent-length: 3\r\n\r\n" % server.port
        )


@pytest.mark.parametrize("message", [OK, CHUNKED, TO_THE_END], ids=["length", "chunked", "to the end"])
async def test_a_reply_may_come_in_any_pieces(message: bytes) -> None:
    for size in (1, 2, 7, len(message)):
        pieces = [message[at : at + size] for at in range(0, len(message), size)]
        async with serving(says(*pieces, close=message is TO_THE_END)) as server, connected() as network:
            assert (await network.exchange(post(server.url()))).body == b"[1,2]"


@pytest.mark.parametrize(
    ("message", "status", "body"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK, 200, b"[1,2]"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n", 500, b""),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\n[]", 200, b"[]"),
    ],
    ids=["interim", "no content", "empty", "1.0"],
)
async def test_replies_of_every_form_are_read(message: bytes, status: int, body: bytes) -> None:
    async with serving(says(message)) as server, connected() as network:
        reply = await network.exchange(post(server.url()))
        assert (reply.status, reply.body) == (status, body)
        assert "link" not in reply.headers


@pytest.mark.parametrize(
    "message",
    [
        CHUNKED.replace(b"3;x=y\r\n", b"3  \r\n"),
        OK.replace(b"application/json", b"application/json;\r\n charset=utf-8"),
        OK.replace(b"application/json", b"application/\x01json"),
        OK.replace(b"\r\n", b"\n"),
        OK.replace(b"length:", b"length :"),
    ],
    ids=["padded chunk size", "folded header", "control character", "lines that end in LF", "space before the colon"],
)
async def test_what_other_clients_read_is_read_as_they_do_and_the_connection_is_used_again(message: bytes) -> None:
    for size in (1, len(message)):
        pieces = [message[at : at + size] for at in range(0, len(message), size)]
        async with serving(says(*pieces)) as server, connected() as network:
            for _ in range(2):
                assert (await network.exchange(post(server.url()))).body == b"[1,2]"
            assert server.connections == 1


async def test_headers_of_one_name_are_one_and_names_are_lower_case() -> None:
    message = b"HTTP/1.1 200 OK\r\nX-One: a\r\nx-one: b\r\nx-two: \xe4\r\ncontent-length: 0\r\n\r\n"
    async with serving(says(message)) as server, connected() as network:
        headers = (await network.exchange(post(server.url()))).headers
        assert (headers["x-one"], headers["x-two"]) == ("a, b", "\ufffd")


@pytest.mark.parametrize(
    "message",
    [
        CHUNKED.replace(b"\r\n0\r\n", b"\r\n0\r\nretry-after: 9\r\n"),
        OK + OK.replace(b"\r\n", b"\r\nretry-after: 9\r\n", 1),
    ],
    ids=["trailers", "a second reply"],
)
async def test_what_comes_behind_a_reply_s_head_is_none_of_its_headers(message: bytes) -> None:
    async with serving(says(message)) as server, connected() as network:
        reply = await network.exchange(post(server.url()))
        assert reply.body == b"[1,2]"
        assert "retry-after" not in reply.headers
        assert reply.headers.get("content-length", "5") == "5"


async def test_a_connection_that_went_stale_is_replaced_without_a_word() -> None:
    async with serving(says(OK, close=True)) as server, connected() as network:
        for _ in range(3):  # the server closes each time, unannounced
            assert (await network.exchange(post(server.url()))).status == 200
        assert server.connections == 3
        assert len(server.heads) == 3


@pytest.mark.parametrize(("seconds", "sent"), [(0.4, 3), (0.6, 2)])
def test_what_breaks_later_than_a_stale_connection_does_is_left_to_who_counts_calls(seconds: float, sent: int) -> None:
    """An upstream that closes the connection after it has worked on the request may bill it."""

    async def exchange(loop: Ahead) -> None:
        async def works_then_closes(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
            if b"x-warm" in head:
                await until(lambda: server.connections == 3)
                writer.write(OK)
            else:
                loop.move(seconds)
                writer.close()

        async with serving(works_then_closes) as server, connected() as network:
            await asyncio.gather(*(network.exchange(post(server.url(), headers={"x-warm": "1"})) for _ in range(3)))
            for _ in range(2):  # a call and its retry
                with pytest.raises(UpstreamUnreachable, match="broke"):
                    await network.exchange(post(server.url()))
            assert len(server.heads) == 3 + sent

    on_a_moved_clock(exchange)


async def test_a_new_connection_that_breaks_is_not_tried_again() -> None:
    async with serving(says(close=True)) as server, connected() as network:
        with pytest.raises(UpstreamUnreachable):
            await network.exchange(post(server.url()))
        assert len(server.heads) == 1


@pytest.mark.parametrize(
    "message",
    [
        OK[:-1],
        CHUNKED[:-1],
        CHUNKED[:-8],
        OK[:20],
        b"HTTP/1.1 200 OK\r\ncontent-le",
        OK[:-1].replace(b"length:", b"length :"),
        CHUNKED[:-8].replace(b"encoding:", b"encoding :"),
    ],
    ids=range(7),
)
async def test_half_a_reply_is_no_reply(message: bytes) -> None:
    async with serving(says(message, close=True)) as server, connected() as network:
        with pytest.raises(UpstreamUnreachable, match="broke"):
            await network.exchange(post(server.url()))


async def test_a_reset_is_the_end_of_a_reply_that_has_no_other() -> None:
    async def reset(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _head: bytes) -> None:
        writer.write(TO_THE_END[:-2])
        await writer.drain()
        writer.transport.abort()
        raise ConnectionResetError

    async with serving(reset) as server, connected() as network:
        try:
            reply = await network.exchange(post(server.url()))
        except UpstreamUnreachable:
            return
        assert reply.body == b"[1,"  # a reset that looks like an end shows in the body


@pytest.mark.parametrize(
    "message",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 101\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n65\r\n" + b"x" * 101 + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 101,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 20_000,
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
        b"HTTP/1.1 200 " + b"O" * 100_000,
    ],
    ids=["length", "chunks", "to the end", "trailers", "header", "status line"],
)
async def test_reading_stops_at_the_limit(message: bytes) -> None:
    async with serving(says(message)) as server, connected() as network:
        with pytest.raises(UpstreamInvalidResponse, match="large"):
            await network.exchange(post(server.url(), most=100))
        await until(lambda: server.closed == 1)


async def test_and_an_interim_reply_moves_no_limit() -> None:
    endless = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000 + b"content-length: 0\r\n\r\n"
    async with serving(says(endless)) as server, connected() as network:
        with pytest.raises(UpstreamInvalidResponse, match="headers"):
            await network.exchange(post(server.url()))
        await until(lambda: server.closed == 1)


@pytest.mark.parametrize(
    "message",
    [
        b"<html>502</html>\r\n\r\n",
        b"\x16\x03\x01 TLS\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 4\r\n\r\n[1,2]",
        b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n[1,2]",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 000 \r\ncontent-length: 5\r\n\r\n[1,2]",
    ],
    ids=["html", "tls", "two framings", "two lengths", "negative", "upgrade", "status 0"],
)
async def test_what_is_not_an_http_reply_is_refused(message: bytes) -> None:
    async with serving(says(message)) as server, connected() as network:
        with pytest.raises(GatewayError) as caught:
            await network.exchange(post(server.url()))
        assert isinstance(caught.value, UpstreamInvalidResponse)


async def test_a_reply_too_many_is_nobody_s() -> None:
    """One that follows another, or precedes any request, would be taken for the answer to the next request."""
    wrong = OK.replace(b"[1,2]", b"[6,6]")
    for pieces in ((OK + wrong,), (OK, wrong)):
        async with serving(says(*pieces)) as server, connected() as network:
            assert (await network.exchange(post(server.url()))).body == b"[1,2]"
            await until(lambda: all(each.closed for kept in network._idle.values() for _, each in kept))
            assert (await network.exchange(post(server.url()))).body == b"[1,2]"
            assert server.connections == 2


async def test_a_connection_that_a_reply_ends_is_not_left_to_the_upstream_to_close() -> None:
    async with serving(says(OK.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))) as server, connected() as network:
        assert (await network.exchange(post(server.url()))).body == b"[1,2]"
        await until(lambda: server.closed == 1)


@on_each_loop
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("size", [10**5, 3 * 10**7])
def test_a_request_that_was_refused_before_it_was_sent_keeps_none_waiting(
    size: int,
    scheme: str,
    runs_on: Callable[[], asyncio.AbstractEventLoop],
    context: ssl.SSLContext,
) -> None:

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if b"x-big" in await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 429 Too Many\r\ncontent-length: 0\r\n\r\n")
            await answered.wait()  # and the rest is not read meanwhile
        else:
            writer.write(OK)
        writer.close()

    async def exchange() -> None:
        listener = await asyncio.start_server(early, "127.0.0.1", 0, ssl=context if scheme == "https" else None)
        url = f"{scheme}://localhost:{listener.sockets[0].getsockname()[1]}/"
        async with listener, connected() as network, asyncio.timeout(5):
            assert (await network.exchange(post(url, bytes(size), {"x-big": "1"}))).status == 429
            assert (await network.exchange(post(url))).status == 200
            answered.set()

    answered = asyncio.Event()
    with asyncio.Runner(loop_factory=runs_on) as runner:
        runner.run(exchange())


async def test_after_a_refusal_of_a_small_request_or_an_answer_to_a_large_one_the_connection_is_used_again() -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        writer.write(OK if b"x-big" in head else OK.replace(b"200 OK", b"400 No"))

    async with serving(answer) as server, connected() as network:
        for status, body, headers in ((200, bytes(10**6), {"x-big": "1"}), (400, bytes(10**4), {})) * 2:
            assert (await network.exchange(post(server.url(), body, headers))).status == status
        assert server.connections == 1


async def test_a_connection_on_which_somebody_speaks_unasked_is_closed() -> None:
    answered = asyncio.Event()

    async def speaks_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _head: bytes) -> None:
        writer.write(OK)
        await writer.drain()
        await answered.wait()
        writer.write(OK.replace(b"[1,2]", b"[6,6]"))

    async with serving(speaks_up) as server, connected() as network:
        assert (await network.exchange(post(server.url()))).body == b"[1,2]"
        answered.set()
        await until(lambda: server.closed == 1)
        assert (await network.exchange(post(server.url()))).body == b"[1,2]"
        assert server.connections == 2


async def test_a_reply_nobody_waits_for_any_more_is_nobody_s() -> None:
    release = asyncio.Event()

    async def late(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        if b"x-late" in head:
            await release.wait()
            writer.write(OK.replace(b"[1,2]", b"[6,6]"))
        else:
            writer.write(OK)

    async with serving(late) as server, connected() as network:
        troubles: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, told: troubles.append(told))
        await network.exchange(post(server.url()))
        waiting = asyncio.create_task(network.exchange(post(server.url(), headers={"x-late": "1"})))
        await until(lambda: len(server.heads) == 2)
        waiting.cancel()
        release.set()
        await asyncio.gather(waiting, return_exceptions=True)
        await until(lambda: server.closed == 1)
        assert (await network.exchange(post(server.url()))).body == b"[1,2]"
        assert server.connections == 2
        assert not troubles


async def test_after_a_call_without_an_answer_nothing_is_sent_on_what_lay_idle_meanwhile() -> None:
    """A firewall that has forgotten a connection silently drops what is sent over it."""
    forgotten: set[asyncio.StreamWriter] = set()

    async def behind_a_firewall(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        if b"x-forget" in head:
            forgotten.add(writer)
            await until(lambda: len(forgotten) == 3)
        elif writer in forgotten:
            return
        writer.write(OK)

    async with serving(behind_a_firewall) as server, connected() as network:
        await asyncio.gather(*(network.exchange(post(server.url(), headers={"x-forget": "1"})) for _ in range(3)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await network.exchange(post(server.url()))
        async with asyncio.timeout(1):
            assert (await network.exchange(post(server.url()))).body == b"[1,2]"
        await until(lambda: server.closed == 3)


async def test_at_the_end_what_lies_idle_is_closed() -> None:
    async with serving(says(OK)) as server:
        async with connected() as network:
            await network.exchange(post(server.url()))
            assert server.closed == 0
        await until(lambda: server.closed == 1)


async def test_an_empty_body_has_a_length_where_one_is_expected() -> None:
    async with serving(says(OK)) as server, connected() as network:
        for method in ("POST", "GET"):
            await network.exchange(WireRequest(method, server.url()))
        assert [b"\r\ncontent-length: 0\r\n" in head for head in server.heads] == [True, False]  # RFC 9110 8.6


async def test_what_a_reply_announces_takes_no_memory_until_it_comes() -> None:
    async with (
        serving(says(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n[")) as server,
        connected() as network,
    ):
        tracemalloc.start()
        call = asyncio.create_task(network.exchange(post(server.url(), most=10**8)))
        await until(lambda: len(server.heads) == 1)
        await settle()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert peak < 10**7


async def test_a_connection_that_lies_idle_keeps_nothing_of_the_last_reply() -> None:
    chunk = b"%x\r\n%b\r\n" % (10**5, b"x" * 10**5)
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk * 50 + b"0\r\n\r\n"
    async with serving(says(chunked)) as server, connected() as network:
        tracemalloc.start()
        reply: WireReply | None = await network.exchange(post(server.url(), most=10**8))
        assert reply is not None
        assert len(reply.body) == 5 * 10**6
        reply = None
        await settle()
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held < 10**6
        await network.exchange(post(server.url(), most=10**8))
        assert server.connections == 1, "it was kept"


async def test_calls_at_once_have_a_connection_each_and_never_each_other_s_reply() -> None:
    async def echo(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        number = head.split(b"x-number: ")[1].split(b"\r\n")[0]
        for _ in range(int(number) % 3):
            await settle()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(number), number))

    async with serving(echo) as server, connected() as network:
        for _ in range(3):
            calls = [network.exchange(post(server.url(), headers={"x-number": str(n)})) for n in range(20)]
            assert [reply.body for reply in await asyncio.gather(*calls)] == [b"%d" % n for n in range(20)]
        assert server.connections == 20


async def test_a_connection_that_lay_idle_too_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "KEEP_ALIVE", 0.01)
    async with serving(says(OK)) as server, connected() as network:
        await network.exchange(post(server.url()))
        await until(lambda: server.closed == 1)
        assert not network._idle


def test_a_connection_in_use_is_replaced_after_five_minutes_so_that_a_name_that_has_moved_is_followed() -> None:
    async def exchange(loop: Ahead) -> None:
        async with serving(says(OK)) as server, connected() as network:
            for _ in range(12):
                loop.move(28)
                await network.exchange(post(server.url()))
                assert server.connections == 1
            await until(lambda: server.closed == 1)
            await network.exchange(post(server.url()))
            assert server.connections == 2

    on_a_moved_clock(exchange)


@pytest.mark.parametrize("line_break", ["\r\n", "\n", "\r"])
async def test_a_header_with_a_line_break_is_not_sent(line_break: str) -> None:
    async with serving(says(OK)) as server, connected() as network:
        with pytest.raises(UpstreamMisconfigured):
            await network.exchange(post(server.url(), headers={"x": f"a{line_break}y: b"}))
        assert not server.heads


async def test_no_connection_is_told_without_the_address() -> None:
    async with serving(says(OK)) as server:
        port = server.port
    async with connected() as network:
        for url in (f"http://127.0.0.1:{port}/?token=secret", "http://no-such-host.invalid/?token=secret"):
            with pytest.raises(UpstreamUnreachable) as caught:
                await network.exchange(post(url))
            assert "secret" not in caught.value.message


async def test_no_connection_is_told_with_its_reason() -> None:
    async with serving(says(OK)) as server:
        port = server.port
    async with connected() as network:
        with pytest.raises(UpstreamUnreachable, match=r"^no connection to the upstream: Connection refused$"):
            await network.exchange(post(f"http://127.0.0.1:{port}/"))
        with pytest.raises(
            UpstreamUnreachable, match=r"^no connection to the upstream: \w[\w ]+$"
        ):  # the system's message
            await network.exchange(post("http://no-such-host.invalid/"))


async def test_to_be_out_of_descriptors_is_no_fault_of_the_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def first_of_a_process(*args: Any, **more: Any) -> Any:
        """Without a descriptor it cannot read the resolver's configuration, and finds no name."""
        try:
            return look_up(*args, **more)
        except OSError as error:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from error

    monkeypatch.setattr(socket, "getaddrinfo", first_of_a_process)
    async with serving(says(OK)) as server, connected() as network:
        for host in ("127.0.0.1", "localhost"):  # a name cannot be looked up without a descriptor
            with no_descriptors(), pytest.raises(Overloaded, match="Too many open files") as caught:
                await network.exchange(post(server.url(host=host)))
            assert type(caught.value) is Overloaded, "and not the upstream's"


async def test_to_be_out_of_threads_is_no_fault_of_the_upstream() -> None:
    async with serving(says(OK)) as server, connected() as network:
        with no_threads(), pytest.raises(Overloaded, match="no room for another connection") as caught:
            await network.exchange(post(server.url(host="localhost")))
        assert type(caught.value) is Overloaded, "and not the upstream's"
        await network.exchange(post(server.url(host="localhost")))


@pytest.mark.parametrize(("host", "ours"), [("127.0.0.1", True), ("[::ffff:127.0.0.1]", False)])
async def test_to_be_out_of_ports_is_no_fault_of_the_upstream(
    host: str, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With IPv6 the system says the same if this host has no address, which does not pass."""

    def the_same_port(address: Any) -> socket.socket:
        made = socket.socket(address[0])
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host.strip("[]"), port))
        return made

    port, start = 0, aiohappyeyeballs.start_connection
    async with serving(says(OK)) as server, connected() as network:
        monkeypatch.setattr(aiohappyeyeballs, "start_connection", partial(start, socket_factory=the_same_port))
        await network.exchange(post(server.url(host=host)))
        port = next(iter(network._idle.values()))[0][1].transport.get_extra_info("sockname")[1]
        calls = [network.exchange(post(server.url(host=host))) for _ in range(2)]
        answer, failure = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answer, WireReply)
        assert type(failure) is (Overloaded if ours else UpstreamUnreachable)


async def test_a_look_up_that_is_out_of_memory_is_no_fault_of_the_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_asked: Any, **_more: Any) -> Any:
        raise socket.gaierror(socket.EAI_MEMORY, "Memory allocation failure")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    async with connected() as network:
        with pytest.raises(Overloaded, match="Memory allocation failure") as caught:
            await network.exchange(post("http://upstream.example/v1"))
        assert type(caught.value) is Overloaded, "and not the upstream's"


@pytest.mark.timeout(20)
async def test_a_look_up_whose_thread_never_begins_holds_up_nobody_and_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As without memory for it, which would strike anywhere in this process."""
    monkeypatch.setattr(resolver, "TIMEOUT", 0.05)
    async with serving(says(OK)) as server, connected() as network:
        with monkeypatch.context() as starved:
            starved.setattr(_thread, "start_new_thread", lambda *_: 0)
            starved.setattr(threading, "_start_new_thread", lambda *_: 0)
            with pytest.raises(UpstreamUnreachable, match="in time"):
                await network.exchange(post(server.url()))
        assert (await network.exchange(post(server.url()))).body == b"[1,2]"


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
async def test_an_address_without_a_port_leads_to_its_scheme_s(
    scheme: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[Any, ...]] = []

    def look_up(*asked: Any, **kwargs: Any) -> Any:
        looked.append(asked)
        raise socket.gaierror("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    async with connected() as network:
        with pytest.raises(UpstreamUnreachable):
            await network.exchange(post(f"{scheme}://upstream.example/v1"))
    assert looked == [(b"upstream.example", port)]


# --- TLS -------------------------------------------------------------------------------------------------


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """The context of a server that is trusted."""
    server, trusted = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    return server


def certificate(directory: Path, *, name: str = "localhost", days: int = 2) -> tuple[ssl.SSLContext, Path]:
    """A server's context with a self-signed certificate for `name`, and the file with which to trust it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=10))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, private = directory / f"{name}{days}.pem", directory / f"{name}{days}.key"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(public, private)
    return context, public


async def test_tls_is_spoken_with_who_can_prove_its_name(context: ssl.SSLContext) -> None:
    big = random.Random(7).randbytes(5_000_001)
    message = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(big), big)
    async with serving(says(message), context) as server, connected() as network:
        for _ in range(2):
            reply = await network.exchange(post(server.url(scheme="https", host="localhost"), big, most=6_000_000))
            assert reply.body == big
        assert server.connections == 1
        assert server.bodies == [big, big]


async def test_a_connection_that_a_reply_ends_does_not_wait_for_the_upstream_s_goodbye(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, trusted = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    release, lost = threading.Event(), asyncio.Event()

    class Watched(Connection):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            lost.set()

    def without_goodbye() -> None:
        with context.wrap_socket(listener.accept()[0], server_side=True) as talk:
            talk.recv(65536)
            talk.sendall(OK.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
            release.wait(20)

    monkeypatch.setattr(networks, "Connection", Watched)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serve = asyncio.create_task(asyncio.to_thread(without_goodbye))
        url = f"https://localhost:{listener.getsockname()[1]}/v1/embeddings"
        try:
            async with connected() as network, asyncio.timeout(5):
                assert (await network.exchange(post(url))).body == b"[1,2]"
                await lost.wait()
        finally:
            release.set()
            await serve


async def test_certificates_that_cannot_be_read_for_want_of_a_descriptor_are_read_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, trusted = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    async with serving(says(OK), context) as server, connected() as network:
        with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
            network._context()  # as if its connection had taken the last descriptor
        assert (await network.exchange(post(server.url(scheme="https", host="localhost")))).status == 200


@pytest.mark.parametrize("wrong", ["not trusted", "other name", "expired"])
async def test_tls_with_anyone_else_is_refused_for_good(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, days = ("elsewhere" if wrong == "other name" else "localhost"), (-1 if wrong == "expired" else 2)
    context, trusted = certificate(tmp_path, name=name, days=days)
    if wrong != "not trusted":
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    async with serving(says(OK), context) as server, connected() as network:
        with pytest.raises(UpstreamUnreachable, match="TLS") as caught:
            await network.exchange(post(server.url(scheme="https", host="localhost")))
        assert not caught.value.retryable
        assert not server.heads
        reasons = {
            "not trusted": "self-signed certificate",
            "other name": "Hostname mismatch",
            "expired": "certificate has expired",
        }
        assert caught.value.message.endswith(f" was refused: {reasons[wrong]}")


@on_each_loop
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_upstream_that_wants_a_certificate_of_ours_refuses_for_good(
    version: ssl.TLSVersion,
    runs_on: Callable[[], asyncio.AbstractEventLoop],
    context: ssl.SSLContext,
) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = version

    def refuse() -> None:
        raw, _ = listener.accept()
        with raw.dup() as kept:  # closing with something unread would be a reset, which may outrun the alert
            with suppress(ssl.SSLError):
                context.wrap_socket(raw, server_side=True)
            while kept.recv(65536):
                pass

    async def exchange() -> None:
        async with connected() as network:
            with pytest.raises(UpstreamUnreachable, match=r"TLS.*: \w+ alert [\w ]+$") as caught:
                await network.exchange(post(f"https://localhost:{listener.getsockname()[1]}/"))
            assert not caught.value.retryable

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        served = pool.submit(refuse)
        with asyncio.Runner(loop_factory=runs_on) as runner:
            runner.run(exchange())
        served.result(20)


async def test_a_server_without_tls_is_told_from_one_with_a_bad_certificate() -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener, connected() as network:
        with pytest.raises(UpstreamUnreachable, match=r"TLS.* was refused: [a-z][a-z ]+$"):
            await network.exchange(post(f"https://127.0.0.1:{port}/"))


async def test_a_server_that_never_shakes_hands_is_given_up_after_the_connect_timeout() -> None:
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        gone.set()

    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener, connected(connect_timeout=0.05) as network:
        with pytest.raises(UpstreamUnreachable, match="in time"):
            await network.exchange(post(f"https://127.0.0.1:{port}/"))
        await gone.wait()


async def test_a_pause_of_this_process_ends_no_connection_that_is_being_made(context: ssl.SSLContext) -> None:
    async with serving(says(OK), context) as server, connected(connect_timeout=0.2) as network:
        asyncio.get_running_loop().call_soon(time.sleep, 0.4)  # once the time for the connection has begun
        reply = await network.exchange(post(server.url(scheme="https", host="localhost")))
        assert reply.status == 200


@on_each_loop
def test_a_call_cancelled_as_its_connection_is_made_leaves_no_descriptor_in_use(
    runs_on: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, trusted = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))

    async def exchange() -> None:
        class Cancelling(Connection):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                call.cancel()

        monkeypatch.setattr(networks, "Connection", Cancelling)
        async with serving(says(OK), context) as server, connected() as network:
            call = asyncio.create_task(network.exchange(post(server.url(scheme="https", host="localhost"))))
            assert isinstance((await asyncio.gather(call, return_exceptions=True))[0], asyncio.CancelledError)
            with ExitStack() as opened:
                for _ in range(20):  # one of them has the descriptor, if it is free
                    fresh = opened.enter_context(socket.socket())
                    asyncio.get_running_loop().add_reader(fresh, fresh.close)
                    asyncio.get_running_loop().remove_reader(fresh)
            await until(lambda: server.closed == 1)

    with asyncio.Runner(loop_factory=runs_on) as runner:
        runner.run(exchange())


# --- proxies ------------------------------------------------------------------------------------------------


async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
    """Acts as a proxy on CONNECT: confirms, then passes bytes on."""
    port = int(head.split(b" ")[1].rpartition(b":")[2])
    onward_reader, onward = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()

    try:
        await asyncio.gather(pump(reader, onward), pump(onward_reader, writer), return_exceptions=True)
    finally:
        onward.close()


async def test_by_a_proxy_in_the_clear_the_whole_address_is_asked_for() -> None:
    async with serving(says(OK)) as server:
        async with connected(f"http://me:pass%3Aword@127.0.0.1:{server.port}") as network:
            await network.exchange(post("http://upstream.example/v1/embeddings?a=b"))
        lines = server.heads[0].split(b"\r\n")
        assert lines[0] == b"POST http://upstream.example/v1/embeddings?a=b HTTP/1.1"
        assert b"host: upstream.example" in lines
        assert b"proxy-authorization: Basic " + b64encode(b"me:pass:word") in lines


@pytest.mark.parametrize(
    "interim",
    [b"", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n", b"HTTP/1.1 100 Continue\n\n"],
    ids=["at once", "after interim replies", "after one with lines that end in LF"],
)
async def test_by_a_proxy_tls_is_with_the_upstream_itself(interim: bytes, context: ssl.SSLContext) -> None:
    async def leads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes) -> None:
        writer.write(interim)
        await tunnel(reader, writer, head)

    async with serving(says(OK), context) as server, serving(leads) as proxy:
        async with connected(f"http://me:word@127.0.0.1:{proxy.port}") as network:
            for _ in range(2):
                reply = await network.exchange(post(server.url(scheme="https", host="localhost")))
                assert reply.body == b"[1,2]"
        assert len(proxy.heads) == 1
        assert proxy.heads[0].startswith(b"CONNECT localhost:%d HTTP/1.1\r\n" % server.port)
        assert b"proxy-authorization" in proxy.heads[0]
        assert len(server.heads) == 2
        assert not any(b"proxy-" in head for head in server.heads), "what is the proxy's stays with it"


@pytest.mark.parametrize(("status", "passes"), [(407, False), (403, False), (502, True)])
async def test_a_proxy_that_refuses_is_told_from_the_upstream(status: int, passes: bool) -> None:
    """A proxy that wants another password, or forbids the target, will refuse the next time as well."""
    refusal = b"HTTP/1.1 %d No\r\ncontent-length: 0\r\n\r\n" % status
    async with serving(says(refusal)) as proxy, connected(f"http://127.0.0.1:{proxy.port}") as network:
        with pytest.raises(UpstreamUnreachable, match=rf"proxy.*{status}") as raised:
            await network.exchange(post("https://upstream.example/"))
        assert raised.value.retryable == passes
        await until(lambda: proxy.closed == 1)
        assert proxy.heads[0].startswith(b"CONNECT upstream.example:443 HTTP/1.1\r\nhost: upstream.example:443\r\n")


async def test_a_proxy_in_the_clear_that_wants_a_password_is_told_from_the_upstream() -> None:
    refusal = b"HTTP/1.1 407 No\r\ncontent-length: 0\r\n\r\n"
    async with serving(says(refusal)) as proxy, connected(f"http://127.0.0.1:{proxy.port}") as network:
        for _ in range(2):
            with pytest.raises(
                UpstreamUnreachable, match=r"^the proxy does not lead to the upstream \(HTTP 407\)$"
            ) as told:
                await network.exchange(post("http://upstream.example/"))
            assert not told.value.retryable
        assert len(proxy.heads) == 2
        assert proxy.connections == 1
    async with serving(says(refusal)) as server, connected() as network:
        assert (await network.exchange(post(server.url()))).status == 407


@pytest.mark.parametrize("url", ["http://upstream.example/", "https://upstream.example/"])
async def test_a_proxy_that_is_away_is_not_taken_for_the_upstream(url: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with connected(f"http://127.0.0.1:{closed.getsockname()[1]}") as network:
            with pytest.raises(UpstreamUnreachable, match=r"^no connection to the proxy: Connection refused$"):
                await network.exchange(post(url))


async def test_a_name_that_is_not_found_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that does not answer holds up a lookup far longer than a connection may take."""
    looked: list[str] = []
    answer, real = threading.Event(), socket.getaddrinfo

    def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        looked.append(name)
        if name == "dead.invalid":
            answer.wait(20)
            raise socket.gaierror("no answer")
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    async with serving(says(OK)) as server, connected(connect_timeout=0.2) as dead, connected() as other:
        failed = await asyncio.gather(
            *(dead.exchange(post("http://dead.invalid/v1")) for _ in range(50)), return_exceptions=True
        )
        assert {type(each) for each in failed} == {UpstreamUnreachable}
        assert looked == ["dead.invalid"]
        assert (await other.exchange(post(server.url(host="localhost")))).body == b"[1,2]"
        answer.set()
        await until(lambda: not dead._resolver._lookups)
        with pytest.raises(UpstreamUnreachable):
            await dead.exchange(post("http://dead.invalid/v1"))
        assert looked.count("dead.invalid") == 2


@pytest.mark.parametrize(
    ("trouble", "later", "served"),
    [
        (None, 599, True),
        (socket.EAI_AGAIN, 599, True),
        (socket.EAI_NONAME, 599, False),
        (socket.EAI_AGAIN, 601, False),
    ],
    ids=["no answer", "a server's failure", "no such name", "too old"],
)
def test_while_a_name_server_is_in_trouble_the_last_addresses_of_a_name_serve(
    trouble: int | None, later: float, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, real = threading.Event(), socket.getaddrinfo

    async def exchange(loop: Ahead) -> None:
        looked: list[Any] = []

        def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
            looked.append(host)
            if len(looked) == 1:
                return real("127.0.0.1", *args, **kwargs)
            if trouble is None:
                loop.call_soon_threadsafe(loop.move, 1.0)
                ended.wait(20)
            raise socket.gaierror(trouble if len(looked) == 2 else socket.EAI_AGAIN, "in trouble")

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        async with serving(says(OK.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))) as server:
            async with connected() as network:
                url = server.url(host="name.invalid")
                assert (await network.exchange(post(url))).body == b"[1,2]"
                loop.move(later)
                if served:
                    for _ in range(2 if trouble else 1):  # one more failure takes them from nobody
                        assert (await network.exchange(post(url))).body == b"[1,2]"
                else:
                    for _ in range(2):  # "no such name" holds until a name server says otherwise
                        with pytest.raises(UpstreamUnreachable):
                            await network.exchange(post(url))
                ended.set()
                await until(lambda: not network._resolver._lookups)
            assert len(looked) == (3 if trouble else 2)

    on_a_moved_clock(exchange)


class NoNames(uvloop.Loop):
    """An event loop whose resolver threads are all waiting for Redis's name, whose name server does not answer."""

    async def getaddrinfo(self, *_args: Any, **_kwargs: Any) -> Any:
        await asyncio.Event().wait()


def test_a_name_of_redis_that_is_not_found_holds_up_no_upstream() -> None:
    async def exchange() -> WireReply:
        async with serving(says(OK)) as server, connected(connect_timeout=1.0) as network:
            return await network.exchange(post(server.url()))

    with asyncio.Runner(loop_factory=NoNames) as runner:
        assert runner.run(exchange()).body == b"[1,2]"


async def test_who_hangs_up_takes_a_name_s_address_from_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer, real = threading.Event(), threading.Event(), socket.getaddrinfo

    def look_up(_host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.set()
        answer.wait(20)
        return real("127.0.0.1", *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    async with serving(says(OK)) as server, connected() as network:
        url = server.url(host="slow.invalid")
        leaves, stays = (asyncio.create_task(network.exchange(post(url))) for _ in range(2))
        await until(asked.is_set)
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        answer.set()
        assert (await stays).body == b"[1,2]"


async def test_a_connection_that_has_ended_says_so() -> None:
    connection = Connection(memoryview(bytearray(1024)))
    connection.closed = True
    with pytest.raises(StaleConnection):
        await connection.exchange(b"", MOST)
