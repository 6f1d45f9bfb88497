"""The client over an injected httpx transport, as `create_app` accepts one, and over the network."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from app.errors import GatewayError, UpstreamInvalidResponse, UpstreamTimeout, UpstreamUnreachable
from app.types import WireReply, WireRequest
from app.upstreams.client import Client
from app.upstreams.network import NetworkEngine

ASKED = WireRequest("POST", "http://up.invalid/embeddings", body=b"{}", max_reply=8)


async def told(answer: httpx.Response | httpx.TransportError, max_reply: int = 8) -> WireReply:
    def handle(request: httpx.Request) -> httpx.Response:
        assert request.content == ASKED.body
        if isinstance(answer, httpx.TransportError):
            raise answer
        return answer

    client = Client(httpx.MockTransport(handle), timeout=30)
    try:
        return await client.send(replace(ASKED, max_reply=max_reply))
    finally:
        await client.aclose()


@pytest.mark.parametrize("how", [{"content": b"12345678"}, {"stream": httpx.ByteStream(b"12345678")}])
async def test_a_reply_may_be_there_whole_or_come_in_pieces(how: dict[str, Any]) -> None:
    reply = await told(httpx.Response(201, headers={"X-Told": "yes"}, **how))
    assert (reply.status, reply.headers["x-told"], reply.body) == (201, "yes", b"12345678")


async def test_a_reply_is_bounded() -> None:
    with pytest.raises(UpstreamInvalidResponse, match="larger than 8 bytes"):
        await told(httpx.Response(200, content=b"123456789"))


@pytest.mark.parametrize("encoding", ["", "Identity", "identity, identity", "UTF-8", "none", "application/json"])
async def test_an_encoding_that_compresses_nothing_changes_nothing(encoding: str) -> None:
    reply = await told(httpx.Response(200, headers={"content-encoding": encoding}, stream=httpx.ByteStream(b"[1,2]")))
    assert reply.body == b"[1,2]"


def compressed(status: int, encoding: str, body: bytes) -> httpx.Response:
    headers = {"content-encoding": encoding, "retry-after": "9"}
    return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))


RAW = zlib.compressobj(wbits=-15)
GZIP, DEFLATE, WITHOUT_HEADER = gzip.compress(b"[1,2]"), zlib.compress(b"[1,2]"), RAW.compress(b"[1,2]") + RAW.flush()


@pytest.mark.parametrize("status", [200, 429])
@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", GZIP),
        ("X-GZIP", GZIP),
        ("identity, gzip", GZIP),
        ("deflate", DEFLATE),
        ("deflate", WITHOUT_HEADER),
    ],
    ids=["gzip", "x-gzip", "a list", "deflate", "deflate without its header"],
)
async def test_a_reply_compressed_unasked_is_read_whatever_its_status(status: int, encoding: str, body: bytes) -> None:
    reply = await told(compressed(status, encoding, body), max_reply=100)
    assert (reply.status, reply.headers["retry-after"], reply.body) == (status, "9", b"[1,2]")


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("br", b"\x0b\x02\x80[1,2]\x03"),
        ("zstd", b"(\xb5/\xfd"),
        ("compress", b"\x1f\x9d"),
        ("gzip, br", GZIP),
        ("gzip, gzip", gzip.compress(GZIP)),
        ("gzip", b"[1,2]"),
        ("gzip", GZIP[:-1]),
        ("gzip", GZIP[:-8] + bytes(8)),
        ("deflate", DEFLATE[:-1]),
    ],
    ids=["br", "zstd", "compress", "two kinds", "twice", "not at all", "cut off", "damaged", "cut off deflate"],
)
async def test_one_that_cannot_be_read_is_refused_and_an_error_keeps_its_status(encoding: str, body: bytes) -> None:
    with pytest.raises(UpstreamInvalidResponse, match="compressed its reply although asked not to"):
        await told(compressed(200, encoding, body), max_reply=100)
    reply = await told(compressed(429, encoding, body), max_reply=100)
    assert (reply.status, reply.headers["retry-after"], reply.body) == (429, "9", b"")


@pytest.mark.parametrize("status", [200, 429])
async def test_a_compressed_reply_is_as_bounded_as_a_plain_one_and_holds_up_nobody(status: int) -> None:
    size = 2 * 10**7
    bomb = gzip.compress(bytes(size))
    call = asyncio.create_task(told(compressed(status, "gzip", bomb), max_reply=size))
    turns = 0
    while not call.done():
        await asyncio.sleep(0)
        turns += 1
    assert len((await call).body) == size
    assert turns > 20
    with pytest.raises(UpstreamInvalidResponse, match=f"larger than {size - 1} bytes"):
        await told(compressed(status, "gzip", bomb), max_reply=size - 1)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError, UpstreamUnreachable),
        (httpx.ConnectTimeout, UpstreamUnreachable),
        (httpx.ReadTimeout, UpstreamTimeout),
        (httpx.ReadError, UpstreamUnreachable),
        (httpx.RemoteProtocolError, UpstreamUnreachable),
    ],
)
async def test_trouble_is_told_in_our_words_and_without_the_address(
    error: type[httpx.TransportError], kind: type[GatewayError]
) -> None:
    with pytest.raises(kind) as caught:
        await told(error("http://up.invalid/?key=canary"))
    assert "canary" not in caught.value.message


async def test_an_answer_that_came_in_time_is_read_though_this_process_had_no_turn_until_it_was_due() -> None:
    """As under a quota of CPU time, or a debugger: it is paid for."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        asked, go_on = threading.Event(), threading.Event()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                asked.set()
                go_on.wait(20)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

        client = Client(NetworkEngine(connect_timeout=20), timeout=1)
        answered = pool.submit(serve)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        sending = asyncio.create_task(client.send(WireRequest("POST", url, {}, b"{}", max_reply=8)))
        began = time.monotonic()
        while not asked.is_set():
            await asyncio.sleep(0)
        go_on.set()
        answered.result(20)
        time.sleep(max(0.0, began + 1.1 - time.monotonic()))  # noqa: ASYNC251  # no turn for this process
        assert (await sending).body == b"{}"
        await client.aclose()


async def test_after_a_pause_an_answer_that_could_not_all_come_meanwhile_is_read_to_its_end() -> None:
    """The upstream sends on only as this process reads, and more comes at every round trip."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        asked, piece, pieces = threading.Event(), b"x" * 2**16, 64

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(piece))
                connection.recv(65536)
                asked.set()
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (pieces * len(piece)))
                for _ in range(pieces):
                    connection.sendall(piece)
                    time.sleep(0.005)  # a round trip

        client = Client(NetworkEngine(connect_timeout=20), timeout=1)
        answered = pool.submit(serve)
        request = WireRequest("POST", f"http://127.0.0.1:{listener.getsockname()[1]}/", {}, b"{}", max_reply=2**23)
        sending = asyncio.create_task(client.send(request))
        began = time.monotonic()
        while not asked.is_set():
            await asyncio.sleep(0)
        time.sleep(max(0.0, began + 1.3 - time.monotonic()))  # noqa: ASYNC251  # the process is paused
        try:
            assert len((await sending).body) == pieces * len(piece)
        finally:
            await client.aclose()
        answered.result(20)
