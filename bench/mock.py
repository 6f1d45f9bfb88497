"""An upstream that is never the bottleneck: OpenAI's dialect from ready-made pieces, with counts of its work.

    python -m bench.mock PORT

`POST /control {"kind": "A"|"B", "digits": "short"|"long", "latency": seconds}` sets how it answers and resets the
counts; `GET /stats` returns them. Kind A answers base64 when asked for it, kind B always answers numbers.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any, cast

import httptools
import orjson
import uvloop

from bench import pool

_ROWS = 2048
_OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
_HEADS = [b'%b{"object":"embedding","index":%d,"embedding":' % (b"," if i else b"", i) for i in range(_ROWS)]
_VECTORS = {name: [getattr(each, name) + b"}" for each in pool.vectors()] for name in ("base64", "short", "long")}


@dataclass
class State:
    """How the mock answers, and its counts since the last reset."""

    kind: str = "A"
    digits: str = "short"
    latency: float = 0.0
    calls: int = 0
    rows: int = 0
    tokens: int = 0
    most_rows: int = 0
    at_once: int = 0
    most_at_once: int = 0

    def control(self, settings: dict[str, Any]) -> None:
        self.kind = settings.get("kind", self.kind)
        self.digits = settings.get("digits", self.digits)
        self.latency = settings.get("latency", self.latency)
        self.calls = self.rows = self.tokens = self.most_rows = self.most_at_once = 0

    def stats(self) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {**asdict(self), "cpu": used.ru_utime + used.ru_stime}

    def embed(self, raw: bytes) -> list[bytes]:
        """The pieces of a response body."""
        request = orjson.loads(raw)
        texts = request["input"]
        if isinstance(texts, str):
            texts = [texts]
        model = request["model"]
        form = "base64" if self.kind == "A" and request.get("encoding_format") == "base64" else self.digits
        table = _VECTORS[form]
        start = pool.seed(model)
        pieces = [b'{"object":"list","data":[']
        add = pieces.append
        for head, text in zip(_HEADS, texts, strict=False):
            add(head)
            add(table[pool.vector_index(text, start)])
        # Not a tokenizer's count, but as deterministic.
        tokens = sum(map(len, texts)) // 4 + len(texts)
        add(b'],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (orjson.dumps(model), tokens, tokens))
        self.calls += 1
        self.rows += len(texts)
        self.tokens += tokens
        self.most_rows = max(self.most_rows, len(texts))
        return pieces


class Connection(asyncio.Protocol):
    """One kept-alive connection, without pipelining."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_url(self, url: bytes) -> None:
        self._path = url
        self._body = []

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        raw = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        if not self._path.endswith(b"/embeddings"):
            self._write([self._other(raw)])
            return
        state = self._state
        pieces = state.embed(raw)
        if not state.latency:
            state.most_at_once = max(state.most_at_once, 1)
            self._write(pieces)
            return
        state.at_once += 1
        state.most_at_once = max(state.most_at_once, state.at_once)
        self._loop.call_later(state.latency, self._late, pieces)

    def _late(self, pieces: list[bytes]) -> None:
        self._state.at_once -= 1
        self._write(pieces)

    def _other(self, raw: bytes) -> bytes:
        if self._path == b"/control":
            self._state.control(orjson.loads(raw))
        elif self._path.endswith(b"/models"):
            return orjson.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in pool.MODELS]})
        return orjson.dumps(self._state.stats())

    def _write(self, pieces: list[bytes]) -> None:
        body = b"".join(pieces)
        self._transport.write(_OK % len(body) + body)


async def serve(port: int) -> None:
    """Serves on loopback until the process is ended."""
    state = State()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(state), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
