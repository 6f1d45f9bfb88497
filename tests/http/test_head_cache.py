"""The cache of request heads: a connection yields the same requests whether a head is parsed or cached."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from uvicorn.server import ServerState

from app.http import head_cache
from app.http.outbox import Outbox
from app.http.protocol import Protocol
from app.serve import uvicorn_config
from tests.harness import settings_of


class Wire(asyncio.Transport):
    """The other end's view of one connection: what was written, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = self.paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("sockname", "peername") else default

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def writelines(self, pieces: Any) -> None:
        self.written.append(b"".join(pieces))

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Server:
    """One connection to an application that answers each request with its number."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, Any], bytes]] = []
        config = uvicorn_config(
            self._answer, settings_of({"upstreams": {"lexical": {"type": "lexical"}}}), interface="asgi3"
        )
        config.load()
        self.wire = Wire()
        self.protocol = Protocol(
            config, ServerState(), {}, outbox=Outbox(), on_invalid_http=lambda *_: None, timeout=lambda: 60.0
        )
        self.protocol.connection_made(self.wire)

    async def _answer(self, scope: Any, receive: Any, _send: Any) -> None:
        body, more = scope["extensions"]["body"]() or b"", False
        if not body:
            more = True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        told = {name: value for name, value in scope.items() if name != "extensions"}
        self.requests.append((told, body))
        for _ in range(
            5 * (len(self.requests) % 2)
        ):  # every other answer takes longer, and still comes before the next
            await asyncio.sleep(0)
        answer = b"%d" % len(self.requests)
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n" % len(answer)
        await scope["extensions"]["respond"](head, [answer], len(answer), float("inf"))

    async def hear(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            if not self.wire.closed:
                self.protocol.data_received(piece)
            for _ in range(100):  # turns enough to answer everything received
                await asyncio.sleep(0)
        self.wire.closed = True
        self.protocol.connection_lost(None)


PLAIN = b"POST /v1/embeddings?a=b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nAuthorization: Bearer one\r\n\r\n"
HEADS = [
    PLAIN,
    PLAIN.replace(b"Length: ", b"Length:"),
    PLAIN.replace(b"%d\r\n", b"%d \t\r\n"),
    PLAIN.replace(b"%d", b"0%d"),
    PLAIN.replace(b"one", b"two"),
    PLAIN.replace(b"Content-L", b"CONTENT-l").replace(b"/v1/", b"/%%76%%31/"),
    PLAIN.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue"),
    PLAIN.replace(b"Host: x", b"Host: x\r\nX-Note: Content-Length: 5"),
    PLAIN.replace(b" /v1", b" http://x/v1"),
    PLAIN.replace(b"HTTP/1.1\r\nHost: x", b"HTTP/1.0\r\nConnection: keep-alive"),
    PLAIN.replace(b"Host", b"Host: y\r\nHost"),
    PLAIN.replace(b"Host: x", b"Host: x\r\nContent-Length: %d"),
    PLAIN.replace(b"Host: x", b"Host: x\r\nConnection: close"),
    PLAIN.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked"),
    b"\r\n" + PLAIN,
    b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
]


def request(chance: random.Random, own: bytes) -> bytes:
    """A random request; `own` is the head that this client mostly sends."""
    head = chance.choice(HEADS) if chance.random() < 0.2 else own
    body = chance.choice([b"", b"x", b'{"a":1}', PLAIN % 3 + b"abc", b"\r\n\r\n", b"y" * 100, b"z" * 70_000])
    if b"chunked" in head:
        return head + b"%x\r\n%b\r\n" % (len(body), body) * bool(body) + b"0\r\n\r\n"
    return head % ((len(body),) * head.count(b"%d")) + (body if b"POST" in head else b"")


def pieces(chance: random.Random, requests: list[bytes]) -> list[bytes]:
    """The requests as the network may deliver them: each in pieces, several at once, or all cut anywhere."""
    kind = chance.choice(["each", "several", "all"])
    data, found = list(requests) if kind == "each" else [b"".join(requests)], []
    if kind == "several":
        data = [b"".join(requests[i : i + 3]) for i in range(0, len(requests), 3)]
    for whole in data:
        rest = whole
        while rest:
            size = len(rest) if kind == "several" else chance.choice([1, 7, 150, 30_000, len(rest)])
            found.append(rest[:size])
            rest = rest[size:]
    return found


async def told(data: list[bytes]) -> tuple[list[tuple[dict[str, Any], bytes]], bytes, Server]:
    server = Server()
    await server.hear(data)
    return server.requests, b"".join(server.wire.written), server


@pytest.mark.parametrize("seed", range(200))
async def test_a_connection_says_the_same_whether_heads_are_remembered_or_not(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    own = chance.choice([*HEADS, *HEADS[:1] * 10])
    whole = [request(chance, own) for _ in range(chance.randrange(2, 12))]
    data = pieces(chance, whole)
    await _says_the_same(data, monkeypatch)


@pytest.mark.parametrize("digits", [20, 5000])
async def test_nor_does_a_length_that_no_body_has_make_a_difference(
    digits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _says_the_same([PLAIN % 1 + b"x", PLAIN % 10 + b"y" * 10, PLAIN.replace(b"%d", b"9" * digits)], monkeypatch)


async def _says_the_same(data: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    requests, written, _ = await told(data)
    monkeypatch.setattr(Protocol, "_stores_left", 0)
    expected, answers, _ = await told(data)
    assert requests == expected
    # The request id of a refusal is new each time, and a second may have passed.
    varies = (b"x-request-id", b"date")
    assert [line for line in written.split(b"\r\n") if not line.startswith(varies)] == [
        line for line in answers.split(b"\r\n") if not line.startswith(varies)
    ]


async def test_a_head_that_comes_again_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = [b"x" * size for size in (1, 10, 1, 70_000, 0, 100)]
    data = [piece for body in bodies for piece in (PLAIN % len(body), body) if piece]
    begun = 0
    parsed = Protocol.on_message_begin

    def count(protocol: Protocol) -> None:
        nonlocal begun
        begun += 1
        parsed(protocol)

    monkeypatch.setattr(Protocol, "on_message_begin", count)
    requests, _, _ = await told(data)
    assert [body for _, body in requests] == bodies
    assert begun == 1
    assert len({id(scope["headers"]) for scope, _ in requests}) == len(bodies)


async def test_an_offer_of_another_protocol_is_hidden_from_the_parser_each_time() -> None:
    offer = PLAIN.replace(b"Host: x", b"Host: x\r\nUpgrade: h2c\r\nConnection: Upgrade")
    requests, _, _ = await told([head % 1 + b"x" for head in (PLAIN, offer, offer, PLAIN, offer)])
    assert [(b"ignored", b"h2c") in scope["headers"] for scope, _ in requests] == [False, True, True, False, True]


async def test_a_connection_whose_heads_are_all_different_keeps_trying_for_a_while_only() -> None:
    data = [PLAIN.replace(b"one", b"%d" % i) % 1 + b"x" for i in range(2 * head_cache.MAX_STORES)]
    requests, _, server = await told(data)
    assert len(requests) == len(data)
    assert server.protocol._cached is not None
    assert b"Bearer %d" % (head_cache.MAX_STORES - 1) in server.protocol._cached.after


@pytest.mark.parametrize("size", [head_cache.MAX_HEAD - 200, head_cache.MAX_HEAD])
async def test_a_long_head_is_not_kept(size: int) -> None:
    _, _, server = await told([PLAIN.replace(b"one", b"x" * size) % 1 + b"x"])
    assert (server.protocol._cached is not None) == (size < head_cache.MAX_HEAD)
