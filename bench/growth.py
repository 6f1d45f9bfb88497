"""`python -m bench.growth`: what more of something costs. More inputs in a request, more workers, more gateways over
one Redis, and (`minutes`) more time.

Every answer of the first part and samples of all others are compared bit by bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import orjson

from bench import pool, targets
from bench.load import Result, Spec
from bench.measure import load
from bench.procs import BenchError, Cores, Process, exchange
from bench.targets import Running
from bench.traffic import Shape, wrong_vectors
from tests.processes import free_port
from tests.redis_server import RedisServer

INPUTS = (1, 16, 128, 512, 1024, 2048)
ROWS = 20
"""Inputs per upstream call, in the first part."""
REPEATS = 7
REPLICAS = 4
TEXTS = 4096
"""Texts requested from each replica."""


class Growth:
    """The measurements, over one mock upstream."""

    def __init__(self, stack: contextlib.ExitStack, work: Path, cores: Cores) -> None:
        self._work, self._cores = work, cores
        self._mock_port = free_port()
        mock = Process([sys.executable, "-m", "bench.mock", str(self._mock_port)], cores.mock, work / "mock.log")
        stack.callback(mock.stop)
        mock.wait_for(self._mock_port, "/stats", 20)
        self._texts_sent = 0

    # --- more inputs ----------------------------------------------------------------------------------------

    def inputs(self, encoding: str) -> None:
        """Sends one request of new texts at a time, over an upstream of 20 rows per call. Each size has a process of
        its own: memory left by an earlier one would hide what a later one takes."""
        self._control()
        _head(f"inputs, {encoding}", "ms", "µs an input", "upstream calls", "response, MiB", "peak above idle", "times")
        for count in INPUTS:
            gateway = self._gateway(self._cores.target, models=_models(max_batch=ROWS))
            assert gateway.process is not None
            try:
                self._embed(gateway, ["warm"], encoding)
                gateway.process.reset_peak()
                idle = gateway.process.peak()
                calls = self._calls()
                size = len(self._embed(gateway, self._new_texts(count), encoding)) / 2**20
                calls, peak = self._calls() - calls, gateway.process.peak() - idle
                times = []
                for _ in range(REPEATS):
                    texts = self._new_texts(count)
                    began = time.perf_counter()
                    answer = self._exchange(gateway, texts, encoding)
                    times.append(time.perf_counter() - began)
                    self._compare(answer, texts)
            finally:
                gateway.stop()
            best = min(times)
            many = f"{peak / size:.1f}" if size > 1 else ""
            each = f"{best * 1e6 / count:.0f}"
            _row(f"{count:,}", f"{best * 1000:.1f}", each, calls, f"{size:.2f}", f"{peak:.1f}", many)

    def _embed(self, gateway: Running, texts: Sequence[str], encoding: str) -> bytes:
        answer = self._exchange(gateway, texts, encoding)
        self._compare(answer, texts)
        return answer

    def _exchange(self, gateway: Running, texts: Sequence[str], encoding: str) -> bytes:
        body = orjson.dumps({"model": pool.MODELS[0], "input": texts, "encoding_format": encoding})
        return exchange(gateway.port, "POST", "/v1/embeddings", body, dict(gateway.headers), seconds=60)

    def _compare(self, answer: bytes, texts: Sequence[str]) -> None:
        start = pool.seed(pool.MODELS[0])
        if wrong_vectors(answer, [pool.vector_index(text, start) for text in texts]):
            raise BenchError(f"wrong vectors: {answer[:300]!r}")

    def _new_texts(self, count: int) -> list[str]:
        self._texts_sent += count
        return [f"text {self._texts_sent - i}" for i in range(count)]

    # --- more workers ---------------------------------------------------------------------------------------

    def workers(self, seconds: float) -> None:
        """Sends cache hits of 16 texts from as many load generators as there are cores; compares with one scrape."""
        cores = len(os.sched_getaffinity(0))
        _head("workers", "answered/s", "vectors/s", "processor µs a request", "answered", "counted in one scrape")
        for count in dict.fromkeys((1, 2, cores)):
            gateway = self._gateway(None, server={"workers": count})
            assert gateway.process is not None
            try:
                shape = Shape("hot", 16, "float", headers=gateway.headers)
                spec = Spec(gateway.port, 16, shape, seconds)
                _checked(load(replace(spec, limit=200, seconds=0, warmup=0)))
                before, used = self._counted(gateway), gateway.process.cpu()
                with ThreadPoolExecutor(cores) as threads:
                    results = [_checked(each) for each in threads.map(load, [spec] * cores)]
                used = gateway.process.cpu() - used
                answered = sum(each.total for each in results)
                rate = sum(each.requests / each.seconds for each in results)
                counted = self._counted(gateway) - before
            finally:
                gateway.stop()
            each = f"{used / answered * 1e6:.0f}"
            _row(count, f"{rate:,.0f}", f"{rate * 16:,.0f}", each, f"{answered:,}", f"{counted:,}")

    def _counted(self, gateway: Running) -> int:
        scraped = exchange(gateway.port, "GET", "/metrics").decode()
        found = re.findall(r'^embedding_gateway_requests_total\{[^}]*status="200"[^}]*\} (\S+)$', scraped, re.MULTILINE)
        return int(sum(map(float, found)))

    # --- more gateways over one Redis -------------------------------------------------------------------------

    def replicas(self) -> None:
        """Sends the same texts to each replica, 64 at a time: to one after the other, then to all at once; then as many
        new texts to all at once."""
        self._control()
        _head(
            "cache", "texts asked for", "rows paid", "upstream calls", "vectors/s, first", "others", "all at once",
            "new ones, all at once", "rows paid",
        )  # fmt: skip
        with RedisServer(port=free_port()) as redis:
            shared: Mapping[str, object] = {"redis": {"url": redis.url}}
            for name, cache in (("memory", {}), ("memory and Redis", shared), ("Redis", {"memory": None, **shared})):
                self._replicas(name, cache)

    def _replicas(self, name: str, cache: Mapping[str, object]) -> None:
        self._control()
        with contextlib.ExitStack() as stack:
            running = [self._gateway(self._cores.target, cache=cache) for _ in range(REPLICAS)]
            for each in running:
                stack.callback(each.stop)
            rates = []
            specs = self._same_texts(running)
            for spec in specs:
                result = _checked(load(spec))
                rates.append(result.requests * 64 / result.seconds)
                time.sleep(0.5)  # Redis is written to in the background, a moment later
            paid = self._stats()
            together = _at_once(specs)
            new = _at_once(self._same_texts(running))
            paid_for_new = self._stats()["rows"] - paid["rows"]
        others = sum(rates[1:]) / len(rates[1:])
        speeds = [f"{rate:,.0f}" for rate in (rates[0], others, together, new)]
        _row(name, f"{TEXTS * REPLICAS:,}", f"{paid['rows']:,}", paid["calls"], *speeds, f"{paid_for_new:,}")

    def _same_texts(self, replicas: Sequence[Running]) -> list[Spec]:
        """One run for each replica, all of the same new texts."""
        self._texts_sent += 10_000_000
        shapes = [Shape("fresh", 64, "base64", headers=each.headers, first=self._texts_sent) for each in replicas]
        count = TEXTS // 64
        return [
            Spec(each.port, 8, shape, 0, 0, min_answers=count, limit=count, sample_every=5)
            for each, shape in zip(replicas, shapes, strict=True)
        ]

    # --- more time ----------------------------------------------------------------------------------------------

    def minutes(self, minutes: float, cache: str) -> None:
        """Sends requests of 128 new texts without a pause. `cache` is the size of the memory cache."""
        self._control()
        gateway = self._gateway(self._cores.target, cache={"memory": {"max_size": cache}})
        assert gateway.process is not None
        _head("minute", "requests/s", "peak of this minute, MiB")
        try:
            for minute in range(1, int(minutes) + 1):
                gateway.process.reset_peak()
                self._texts_sent += 10_000_000
                shape = Shape("fresh", 128, "float", headers=gateway.headers, first=self._texts_sent)
                result = _checked(load(Spec(gateway.port, 4, shape, 60, 0)))
                _row(minute, f"{result.requests / result.seconds:,.0f}", f"{gateway.process.peak():.0f}")
        finally:
            gateway.stop()

    # ------------------------------------------------------------------------------------------------------------

    def _gateway(self, core: int | None, **more: object) -> Running:
        return targets.gateway(self._mock_port, self._work, core, more)

    def _control(self) -> None:
        wanted = {"kind": "A", "digits": "short", "latency": 0}
        exchange(self._mock_port, "POST", "/control", orjson.dumps(wanted))

    def _stats(self) -> dict[str, int]:
        stats: dict[str, int] = orjson.loads(exchange(self._mock_port, "GET", "/stats"))
        return stats

    def _calls(self) -> int:
        return self._stats()["calls"]


def _head(*columns: object) -> None:
    print()
    _row(*columns)
    _row(*["---"] * len(columns))


def _row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def _models(**settings: object) -> dict[str, object]:
    deployments = [{"upstream": "mock", "model": pool.MODELS[0]}]
    return {pool.MODELS[0]: {"dimensions": pool.DIMENSIONS, "deployments": deployments, **settings}}


def _checked(result: Result) -> Result:
    """Returns the result. Raises `BenchError` if anything went wrong in the run."""
    if result.errors or result.wrong or not result.total:
        raise BenchError(result.first_error or f"{result.wrong} of {result.compared} vectors are wrong")
    return result


def _at_once(specs: Sequence[Spec]) -> float:
    """Starts all runs at once. Returns their vectors per second, together."""
    with ThreadPoolExecutor(len(specs)) as threads:
        results = [_checked(each) for each in threads.map(load, specs)]
    return sum(each.total for each in results) * 64 / max(each.wall for each in results)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parts = ("inputs", "workers", "replicas", "minutes")
    parser = argparse.ArgumentParser("python -m bench.growth", description=__doc__)
    # Without `choices`, which argparse applies to an empty list as well.
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all but minutes)")
    parser.add_argument("--minutes", type=float, default=10, help="of the part of that name (default: 10)")
    parser.add_argument("--cache", default="256MiB", help="size of the memory cache there (default: the gateway's own)")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    options.parts = options.parts or parts[:3]
    return options


def main() -> None:
    """Prints tables. Raises `BenchError` for any wrong response."""
    options = parse_arguments()
    cores = Cores.of_this_machine()
    with tempfile.TemporaryDirectory(prefix="eg-growth-") as work, contextlib.ExitStack() as stack:
        growth = Growth(stack, Path(work), cores)
        if "inputs" in options.parts:
            growth.inputs("float")
            growth.inputs("base64")
        if "workers" in options.parts:
            growth.workers(3.0)
        if "replicas" in options.parts:
            growth.replicas()
        if "minutes" in options.parts:
            growth.minutes(options.minutes, options.cache)


if __name__ == "__main__":
    main()
