"""The load generator: a closed loop over kept-alive connections, in a process of its own.

    python -m bench.load < spec.json > result.json

Each connection sends its next request when its last one has been answered. Samples of the responses are kept, within a
budget, and compared bit by bit after the run, so that checking does not slow the load down.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from array import array
from dataclasses import asdict, dataclass, field
from typing import cast

import orjson
import uvloop

from bench.traffic import Shape, Traffic, traffic, wrong_vectors

_SAMPLE_BUDGET = 64 * 2**20
"""Bytes of responses to keep for comparison, at most."""
_MAX_REQUESTS = 5_000_000
"""Requests in one run, at most, whatever its `Spec` says."""
_DRAIN = 60.0
"""Seconds to wait for outstanding responses when the time is up."""


@dataclass
class Spec:
    """One run. It lasts `seconds` after `warmup`, and longer, up to `max_seconds`, until `min_answers` answers are in.

    With `limit`, it ends after that many requests.
    """

    port: int
    connections: int
    shape: Shape
    seconds: float = 3.0
    warmup: float = 0.5
    min_answers: int = 20
    max_seconds: float = 30.0
    limit: int = _MAX_REQUESTS
    sample_every: int = 50
    """One in this many responses is compared."""


@dataclass
class Result:
    """The results of a run. Latencies are in milliseconds."""

    requests: int = 0
    seconds: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    slowest: float = 0.0
    errors: int = 0
    first_error: str = ""
    compared: int = 0
    """Vectors compared bit by bit."""
    wrong: int = 0
    total: int = 0
    """Requests answered, including the warm-up's."""
    wall: float = 0.0
    """Seconds from the first request to the last answer."""
    cpu: float = 0.0
    """Seconds of processor time used by the load generator itself."""


@dataclass
class Run:
    """The state shared by the connections of one run."""

    spec: Spec
    traffic: Traffic
    measured_from: float
    sent: int = 0
    answered: int = 0
    counted: int = 0
    last: float = 0.0
    latencies: array[float] = field(default_factory=lambda: array("d"))
    samples: list[tuple[int, list[bytes], bool]] = field(default_factory=list)
    sample_budget: int = _SAMPLE_BUDGET
    errors: int = 0
    first_error: str = ""
    buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(2**20)))

    def fail(self, why: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or why

    def is_over(self, now: float) -> bool:
        """Whether to stop sending."""
        if self.sent >= self.spec.limit:
            return True
        ran = now - self.measured_from
        if ran < self.spec.seconds:
            return False
        return self.counted >= self.spec.min_answers or ran > self.spec.max_seconds or self.errors >= 1000


class Connection(asyncio.BufferedProtocol):
    """One caller: sends, waits, and sends again until the run is over."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._number = -1
        self._started = 0.0
        self._body_left = -1
        """Bytes of the body still to come; -1 while the head is not complete."""
        self._chunked = False
        self._sampled = False
        self._head_bytes = self._tail = self._status = b""
        self._parts: list[bytes] = []
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def _send(self) -> None:
        run = self._run
        if run.is_over(time.perf_counter()):
            self._number = -1
            self._transport.close()
            return
        self._number = number = run.sent
        run.sent += 1
        self._body_left = -1
        self._sampled = number % run.spec.sample_every == 0 and run.sample_budget > 0
        self._parts = []
        request = run.traffic.request(number)
        self._started = time.perf_counter()
        self._transport.write(request)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._run.buffer  # consumed before the next read, so all connections can share it

    def buffer_updated(self, nbytes: int) -> None:
        start = 0
        if self._body_left < 0:
            head = self._head_bytes + bytes(self._run.buffer[: min(nbytes, 4096)])
            end = head.find(b"\r\n\r\n")
            if end < 0:
                self._head_bytes = head
                return
            start = end + 4 - len(self._head_bytes)
            self._read_head(head[:end].lower())
        if self._sampled or self._chunked or self._status != b"200":
            data = bytes(self._run.buffer[start:nbytes])
            self._tail = (self._tail + data)[-7:]
            self._parts.append(data)
        if self._chunked:
            if self._tail == b"\r\n0\r\n\r\n":
                self._on_response()
            return
        self._body_left -= nbytes - start
        if self._body_left <= 0:
            self._on_response()

    def _read_head(self, head: bytes) -> None:
        self._status = head[9:12]
        at = head.find(b"content-length:")
        self._chunked = at < 0
        self._tail = self._head_bytes = b""
        self._body_left = 0 if at < 0 else int(head[at + 15 :].split(b"\r", 1)[0])

    def _on_response(self) -> None:
        run, now = self._run, time.perf_counter()
        if self._status != b"200":
            run.fail(f"{self._status.decode()} {b''.join(self._parts)[:300].decode(errors='replace')}")
        else:
            run.answered += 1
            if run.measured_from <= self._started:
                run.latencies.append(now - self._started)
            if run.measured_from <= now:
                run.counted += 1
                run.last = now
            if self._sampled:
                run.sample_budget -= sum(map(len, self._parts))
                run.samples.append((self._number, self._parts, self._chunked))
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._number >= 0:
            self._run.fail(f"connection lost: {exc!r}")
        if not self.done.done():
            self.done.set_result(None)


def _decode_chunked(parts: list[bytes], chunked: bool) -> bytes:
    """The body, without the chunked transfer coding."""
    body = b"".join(parts)
    if not chunked:
        return body
    plain = []
    at = 0
    while at < len(body):
        line = body.index(b"\r\n", at)
        size = int(body[at:line].split(b";")[0], 16)
        if not size:
            break
        plain.append(body[line + 2 : line + 2 + size])
        at = line + 2 + size + 2
    return b"".join(plain)


async def run(spec: Spec) -> Result:
    """Runs the load and compares the samples."""
    loop = asyncio.get_running_loop()
    state = Run(spec, traffic(spec.shape), time.perf_counter() + spec.warmup)
    began, used = time.perf_counter(), _cpu()

    async def caller() -> None:
        for _ in range(100):  # reconnects to a target that closes connections, but not for ever
            _, connection = await loop.create_connection(lambda: Connection(state), "127.0.0.1", spec.port)
            await connection.done
            if state.is_over(time.perf_counter()):
                return

    callers = [loop.create_task(caller()) for _ in range(spec.connections)]
    _, late = await asyncio.wait(callers, timeout=spec.warmup + max(spec.seconds, spec.max_seconds) + _DRAIN)
    for task in late:
        task.cancel()
        state.fail("no answer in time")
    return _result(state, time.perf_counter() - began, _cpu() - used)


def _result(state: Run, wall: float, cpu: float) -> Result:
    ordered = sorted(state.latencies) or [0.0]
    result = Result(
        requests=state.counted,
        seconds=max(state.last - state.measured_from, 1e-9),
        p50=ordered[len(ordered) // 2] * 1000,
        p99=ordered[len(ordered) * 99 // 100] * 1000,
        slowest=ordered[-1] * 1000,
        errors=state.errors,
        first_error=state.first_error,
        total=state.answered,
        wall=wall,
        cpu=cpu,
    )
    for number, parts, chunked in state.samples:
        expected = state.traffic.expected(number)
        result.compared += len(expected)
        result.wrong += wrong_vectors(_decode_chunked(parts, chunked), expected)
    return result


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Reads a `Spec` from standard input and writes a `Result` to standard output."""
    wanted = orjson.loads(sys.stdin.buffer.read())
    shape = wanted.pop("shape")
    shape["headers"] = tuple((name, value) for name, value in shape["headers"])
    shape["models"] = tuple(shape["models"])
    result = uvloop.run(run(Spec(shape=Shape(**shape), **wanted)))
    sys.stdout.buffer.write(orjson.dumps(asdict(result)))


if __name__ == "__main__":
    main()
