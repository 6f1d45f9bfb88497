"""Shared by the cache's tests: a clock moved by hand, embeddings made from a number, and metrics read back."""

import asyncio
import hashlib
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from app.cache.disk import DiskStore
from app.cache.store import SlowStore
from app.metrics import Metrics
from app.types import Embedding

LIMIT = 20.0
"""Seconds after which what must happen counts as not happening."""

OpenDisk = Callable[..., DiskStore]
"""The `opened` fixture: path, max_size, ttl, each with a default."""


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.wall = 1_800_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def embedding(number: int, dimensions: int = 64) -> Embedding:
    return Embedding(array("f", [number + 1.0, *[0.25] * (dimensions - 1)]).tobytes(), number + 5)


def entries(numbers: Sequence[int], dimensions: int = 64) -> list[tuple[bytes, Embedding]]:
    return [(key(number), embedding(number, dimensions)) for number in numbers]


def count(metrics: Metrics, tier: str, operation: str, result: str) -> float:
    labels = {"tier": tier, "operation": operation, "result": result}
    return metrics.registry.get_sample_value("embedding_gateway_cache_operations_total", labels) or 0.0


def held(metrics: Metrics, tier: str) -> float:
    return metrics.registry.get_sample_value("embedding_gateway_cache_bytes", {"tier": tier}) or 0.0


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Checks the condition on every turn of the event loop until it holds; fails after `LIMIT`."""
    async with asyncio.timeout(LIMIT):
        holds = await condition()
        while not holds:
            await asyncio.sleep(0)
            holds = await condition()


@asynccontextmanager
async def listening(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """Serves each connection with `talk`; yields the loopback port, and waits for all connections at the end."""
    talking: set[asyncio.Task[None]] = set()

    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talking.add(task)
        try:
            await talk(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(conversation, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(*talking)


async def run(program: str, path: Path, *before: str) -> subprocess.CompletedProcess[str]:
    """Runs Python source in a process of its own, with the path as its argument. `before`: the command that runs it."""
    return await asyncio.to_thread(
        subprocess.run,
        [*before, sys.executable, "-c", program, str(path)],
        cwd=Path(__file__).parents[2],
        timeout=LIMIT * 3,
        capture_output=True,
        text=True,
        check=False,
    )


async def present(store: SlowStore, *numbers: int) -> list[int]:
    found = await store.get([key(number) for number in numbers])
    assert all(
        value is None or value.vector[:8] == embedding(n).vector[:8] for n, value in zip(numbers, found, strict=True)
    )
    return [number for number, value in zip(numbers, found, strict=True) if value]
