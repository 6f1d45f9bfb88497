"""The application alone, in this process, over an upstream that answers at once: `python -m bench.micro --texts 16`.

No network, no other process and no parser of HTTP: what is left is the gateway's own work on a request. Where the
machine is too noisy even for that, instructions can be counted: see README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Iterable
from statistics import median
from typing import Any, cast

import httpx
import uvloop

from app import logs
from app.main import App, create_app
from app.types import WireReply, WireRequest
from bench import pool
from bench.mock import State
from bench.targets import KEY
from bench.traffic import Shape, traffic, wrong_vectors
from tests.harness import settings_of

HEADERS = (("authorization", f"Bearer {KEY}"),)


class Engine:
    """The mock upstream without a network (`app.upstreams.client.Engine`)."""

    def __init__(self, kind: str) -> None:
        self._state = State(kind)
        self.seconds = 0.0
        """Spent here, not in the gateway."""

    async def exchange(self, request: WireRequest) -> WireReply:
        if request.method == "GET":
            return WireReply(200, {}, b'{"data":[]}')  # its list of models; the configuration names them
        began = time.perf_counter()
        body = bytearray(b"".join(self._state.embed(request.body)))
        self.seconds += time.perf_counter() - began
        return WireReply(200, {"content-type": "application/json"}, body)

    async def aclose(self) -> None:
        """Has nothing to close."""


def application(engine: Engine) -> App:
    """The application with its default settings, as in `bench.targets`."""
    models = {
        name: {"dimensions": pool.DIMENSIONS, "deployments": [{"upstream": "mock", "model": name}]}
        for name in pool.MODELS
    }
    settings = settings_of(
        {
            "auth": {"keys": {"bench": {"key": KEY}}},
            "upstreams": {"mock": {"type": "openai", "base_url": "http://127.0.0.1/v1", "api_key": "sk-bench"}},
            "models": models,
        }
    )
    either = cast("httpx.AsyncBaseTransport", engine)  # passed to the client, which also accepts an engine
    return create_app(settings, transport=either, request_log=logs.RequestLog("text", len))


class Caller:
    """Sends requests one after the other, as a connection does."""

    def __init__(self, app: App, shape: Shape) -> None:
        self._app, self._traffic = app, traffic(shape)
        head, _ = self._traffic.request(0).split(b"\r\n\r\n")
        self._body_start = len(head) + 4
        fields = (line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
        self._headers = [(name.lower(), value) for name, value in fields]
        self.answers: list[tuple[int, bytes]] = []
        """The last response, with the number of its request."""

    async def ask(self, numbers: Iterable[int]) -> None:
        """Sends these requests. Raises `RuntimeError` for a response that is not a success."""
        for number in numbers:
            body = self._traffic.request(number)[self._body_start :]

            def buffered_body(body: bytes = body) -> bytes:
                return body

            async def respond(head: bytes, body: list[bytes], size: int, until: float, number: int = number) -> None:
                del head, size, until
                self.answers = [(number, b"".join(body))]

            extensions = {"hang_up": set(), "body": buffered_body, "respond": respond}
            scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": self._headers}
            await self._app({**scope, "extensions": extensions}, _nothing, _refused)

    def wrong(self) -> int:
        """The number of wrong vectors in the last response."""
        return sum(wrong_vectors(body, self._traffic.expected(number)) for number, body in self.answers)


async def _nothing() -> dict[str, Any]:
    raise RuntimeError("the body was at hand")


async def _refused(message: Any) -> None:
    raise RuntimeError(f"not answered: {message}")


async def measure(options: argparse.Namespace) -> None:
    """Prints the best and the median of several rounds, in microseconds per request."""
    engine = Engine(options.kind)
    app = application(engine)
    await app.gateway.start()
    gc.collect()
    gc.freeze()
    shape = Shape("hot" if options.hot else "fresh", options.texts, options.encoding, headers=HEADERS)
    callers = [Caller(app, shape) for _ in range(options.at_once)]
    per_caller, first, times = options.requests // options.at_once, 0, []
    for _ in range(options.rounds):
        began = time.perf_counter() - engine.seconds
        async with asyncio.TaskGroup() as tasks:
            for caller in callers:
                tasks.create_task(caller.ask(range(first, first + per_caller)))
                first += per_caller
        times.append((time.perf_counter() - engine.seconds - began) / (per_caller * len(callers)) * 1e6)
    wrong = sum(caller.wrong() for caller in callers)
    print(
        f"best {min(times):.1f} µs, median {median(times):.1f} µs a request; {wrong} wrong vectors in the last answers"
    )
    await app.gateway.aclose()


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.micro", description=__doc__)
    parser.add_argument("--texts", type=int, default=1, help="in a request (default: 1)")
    parser.add_argument("--encoding", choices=("base64", "float"), default="base64")
    parser.add_argument("--at-once", type=int, default=16, help="requests (default: 16)")
    parser.add_argument("--kind", choices=("A", "B"), default="A", help="of upstream (default: A)")
    parser.add_argument("--hot", action="store_true", help="always the same texts")
    parser.add_argument("--requests", type=int, default=2000, help="in a round (default: 2000)")
    parser.add_argument("--rounds", type=int, default=7)
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
