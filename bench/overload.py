"""`python -m bench.overload`: five times as many callers as there is room for, and what the others get meanwhile.

Peak is what as many callers as `max_inflight` are answered. Then five times as many call; who is refused comes back
about when it is told to, after a second. Over an upstream that takes 50 ms. At the end ten
thousand connect and say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import uvloop

from bench import pool, targets
from bench.procs import BenchError, Cores, Process, exchange
from bench.targets import KEY
from tests.processes import free_port

ROOM = 64
"""`max_inflight`."""
OVERLOAD = 5
SECONDS = 5.0
IDLE = 10_000
"""Idle connections, at the end."""
RETRY_AFTER = 1.0
"""Seconds after which a refused caller retries, on average."""


@dataclass
class Timings:
    """How long each response took, in milliseconds."""

    seconds: float
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    healthy: list[float] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Requests answered per second."""
        return len(self.answered) / self.seconds


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[bytes, bool]:
    """Sends a request. Returns the status, and whether the connection closes after it."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    body = await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
    status = head[9:12]
    if status not in (b"200", b"503"):
        raise BenchError(f"{status.decode()} {body[:300].decode(errors='replace')}")
    return status, b"connection: close" in head


async def _caller(port: int, number: int, until: float, timings: Timings) -> None:
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    count = 0
    while (began := time.perf_counter()) < until:
        count += 1
        text = f"caller {number} text {count} {random.random()}"
        body = orjson.dumps({"model": pool.MODELS[0], "input": text, "encoding_format": "base64"})
        request = (
            b"POST /v1/embeddings HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b"
            % (KEY.encode(), len(body), body)
        )
        connection = connection or await asyncio.open_connection("127.0.0.1", port)
        status, ends = await _ask(*connection, request)
        elapsed_ms = (time.perf_counter() - began) * 1000
        if ends:
            connection[1].close()
            connection = None
        if began + elapsed_ms / 1000 > until:
            break  # not counted: by then the other callers have stopped
        if status == b"200":
            timings.answered.append(elapsed_ms)
        else:
            timings.refused.append(elapsed_ms)
            await asyncio.sleep(RETRY_AFTER * (0.5 + random.random()))
    if connection:
        connection[1].close()


async def _probe(port: int, until: float, timings: Timings) -> None:
    """Probes as a load balancer would, over a new connection each time."""
    while (began := time.perf_counter()) < until:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        status, _ = await _ask(reader, writer, b"GET /healthz HTTP/1.1\r\nhost: bench\r\n\r\n")
        writer.close()
        timings.healthy.append((time.perf_counter() - began) * 1000)
        if status != b"200":
            raise BenchError("/healthz does not answer")
        await asyncio.sleep(0.05)


async def _load(port: int, callers: int, seconds: float) -> Timings:
    timings = Timings(seconds=seconds)
    until = time.perf_counter() + seconds
    await asyncio.gather(
        _probe(port, until, timings), *(_caller(port, number, until, timings) for number in range(callers))
    )
    return timings


async def _idle(port: int, process: Process) -> str:
    """Measures what idle connections cost."""
    process.reset_peak()
    before = process.peak()
    writers: list[asyncio.StreamWriter] = []
    try:
        while len(writers) < IDLE:
            opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(100)))
            writers += [writer for _, writer in opened]
        timings = await _load(port, 1, 1.0)
        after = process.peak()
    finally:
        for writer in writers:
            writer.close()
    return (
        f"{IDLE:,} idle connections: {before:.0f} -> {after:.0f} MiB, {(after - before) * 1024 / IDLE:.1f} KiB each; "
        f"a request meanwhile: p50 {_percentile(timings.answered, 0.5):.0f} ms."
    )


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)] if values else 0.0


def _row(name: str, timings: Timings) -> str:
    return (
        f"| {name} | {timings.goodput:,.0f} | {_percentile(timings.answered, 0.5):.0f} "
        f"| {_percentile(timings.answered, 0.99):.0f} "
        f"| {len(timings.refused) / timings.seconds:,.0f} | {_percentile(timings.refused, 0.5):.1f} "
        f"| {_percentile(timings.refused, 0.99):.1f} | {_percentile(timings.healthy, 0.99):.1f} |"
    )


def main() -> None:
    """Prints a table. Raises `BenchError` for a response that is neither a success nor a refusal."""
    argparse.ArgumentParser("python -m bench.overload", description=__doc__).parse_args()
    cores = Cores.of_this_machine()
    os.sched_setaffinity(0, {cores.load})
    with tempfile.TemporaryDirectory(prefix="eg-overload-") as work, contextlib.ExitStack() as stack:
        mock_port = free_port()
        mock = Process([sys.executable, "-m", "bench.mock", str(mock_port)], cores.mock, Path(work, "mock.log"))
        stack.callback(mock.stop)
        mock.wait_for(mock_port, "/stats", 20)
        exchange(mock_port, "POST", "/control", orjson.dumps({"kind": "A", "digits": "short", "latency": 0.05}))
        gateway = targets.gateway(mock_port, Path(work), cores.target, {"server": {"max_inflight": ROOM}})
        stack.callback(gateway.stop)
        uvloop.run(_load(gateway.port, ROOM, 1.0))  # warm
        peak = uvloop.run(_load(gateway.port, ROOM, SECONDS))
        over = uvloop.run(_load(gateway.port, ROOM * OVERLOAD, SECONDS))
        assert gateway.process is not None
        idle = uvloop.run(_idle(gateway.port, gateway.process))
    print("| callers | answered/s | p50 ms | p99 ms | refused/s | p50 ms | p99 ms | /healthz p99 ms |")
    print("| --- " * 8 + "|")
    print(_row(f"{ROOM}, all with room", peak))
    print(_row(f"{ROOM * OVERLOAD}", over))
    print(f"\nGoodput at {OVERLOAD} times the callers: {over.goodput / peak.goodput:.0%} of peak.")
    print(idle)


if __name__ == "__main__":
    main()
