"""A soak test: two replicas over one Redis under mixed traffic, while everything around them fails.

It passes if no vector is wrong, an injected fault explains every error, and memory and descriptors stay flat.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
import subprocess
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import yaml

from tests.processes import PATIENCE, address, free_port, start
from tests.redis_server import RedisServer
from tests.soak.tcp_proxy import TcpProxy
from tests.soak.traffic import Caller, Tally
from tests.soak.vendors import Target, configuration, targets, vendors
from tests.soak.weather import GRACE, Weather

REPLICAS = 2
CALLERS = 24
WARM_UP = 0.25
"""Share of the time after which memory and descriptors must stop growing."""
MEMORY = (32 + 64) * 2**20
"""Bytes by which a replica may still grow: what allocators keep, the cache filling up, and what has waited for Redis to
come back, for which `app.cache.tiers` has 64 MiB."""
DESCRIPTORS = 32
"""Descriptors by which it may still grow: the pools to upstreams and Redis are not always equally full."""
_TROUBLE = re.compile(r"Traceback|Exception in|never retrieved|level=(error|critical)")


@dataclass
class Footprint:
    """Resident memory of a process in bytes, and its open descriptors; both 0 without /proc."""

    memory: int = 0
    descriptors: int = 0

    @classmethod
    def of(cls, pid: int) -> Footprint:
        process = Path(f"/proc/{pid}")
        if not process.exists():
            return cls()
        resident = re.search(r"VmRSS:\s+(\d+) kB", (process / "status").read_text())
        return cls(int(resident[1]) * 1024 if resident else 0, len(list((process / "fd").iterdir())))


@dataclass
class Report:
    """The outcome of a soak."""

    seed: int
    seconds: float
    tally: Tally
    faults: Counter[str]
    before: list[Footprint]
    after: list[Footprint]
    """Per replica, like `before`, which was taken after the warm-up."""
    exit_codes: list[int]
    logged: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Everything that went wrong; empty after a good soak."""
        tally = self.tally
        found = [*tally.wrong, *tally.unexplained, *self.logged]
        for before, after in zip(self.before, self.after, strict=True):
            if after.memory - before.memory > MEMORY:
                found.append(f"memory grew from {before.memory >> 20} to {after.memory >> 20} MiB")
            if after.descriptors - before.descriptors > DESCRIPTORS:
                found.append(f"descriptors grew from {before.descriptors} to {after.descriptors}")
        if any(self.exit_codes):
            found.append(f"the replicas ended with {self.exit_codes}")
        if not (tally.vectors and self.faults and tally.hung_up):
            found.append("nothing was tried")
        return found

    def summary(self) -> str:
        tally = self.tally
        prints = [
            f"memory {before.memory >> 20} -> {after.memory >> 20} MiB, "
            f"descriptors {before.descriptors} -> {after.descriptors}"
            for before, after in zip(self.before, self.after, strict=True)
        ]
        return (
            f"soak {self.seconds:.0f} s, seed {self.seed}: {tally.requests} requests, "
            f"{tally.vectors} vectors verified, {tally.bad['wrong']} wrong; "
            f"{sum(self.faults.values())} faults of {len(self.faults)} kinds, "
            f"{sum(tally.errors.values())} errors explained by them, {tally.bad['unexplained']} unexplained, "
            f"{tally.bad['lost']} lost; {tally.hung_up} hang-ups; {'; '.join(prints)}"
        )


async def _soak(directory: Path, seconds: float, seed: int, redis: RedisServer, port: int) -> Report:
    """Runs for about `seconds`. `redis` is running on `port`; files go to `directory`."""
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(vendors(seed))
        proxy = TcpProxy(port, random.Random(f"{seed}/proxy/redis"))
        await stack.enter_async_context(proxy)
        config = configuration(served, proxy.port)
        (directory / "gateway.yaml").write_text(yaml.safe_dump(config))
        logs = [f"log-{number}" for number in range(REPLICAS)]
        processes = [
            start(directory, "--port", "0", "--config", "gateway.yaml", "--log-format", "text", log=log) for log in logs
        ]
        for process in processes:
            stack.push_async_callback(_end, process)
        urls = [
            await asyncio.to_thread(address, directory / log, process)
            for log, process in zip(logs, processes, strict=True)
        ]
        weather = Weather(served.values(), redis, proxy, seed)
        tally = Tally()
        run = _Run([f"{url}/v1/embeddings" for url in urls], targets(served), weather, tally, seed)
        await run.storm(seconds * WARM_UP, "warm-up")
        before = [Footprint.of(process.pid) for process in processes]
        await run.storm(seconds * (1 - WARM_UP), "main", then_all_is_well=True)
        after = [Footprint.of(process.pid) for process in processes]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        codes = [await asyncio.to_thread(process.wait, PATIENCE) for process in processes]
        lines = [line for log in logs for line in (directory / log).read_text().splitlines()]
        logged = [line for line in lines if _TROUBLE.search(line)]
    return Report(seed, time.monotonic() - began, tally, weather.faults, before, after, codes, logged[:20])


@dataclass
class _Run:
    urls: list[str]
    targets: list[Target]
    weather: Weather
    tally: Tally
    seed: int

    async def storm(self, seconds: float, name: str, *, then_all_is_well: bool = False) -> None:
        """Traffic under faults; then, with `then_all_is_well`, a quiet time in which every model must answer."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            callers = [self._caller(f"{self.seed}/{name}/{number}") for number in range(CALLERS)]
            end = time.monotonic() + seconds
            await asyncio.gather(self.weather.blow(seconds), *(caller.call_until(end, session) for caller in callers))
            if then_all_is_well:
                await asyncio.sleep(GRACE)
            for target in self.targets if then_all_is_well else ():
                await self._caller(f"{self.seed}/{name}/after", [target]).see_it_through(session)
        await asyncio.sleep(0.2)  # until the other side has closed the connections, too

    def _caller(self, seed: str, targets: list[Target] | None = None) -> Caller:
        return Caller(self.urls, targets or self.targets, self.weather, self.tally, seed)


async def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        await asyncio.to_thread(process.wait, PATIENCE)


def run(directory: Path, seconds: float, seed: int) -> Report:
    """Runs a whole soak."""
    port = free_port()
    with RedisServer(port=port) as redis:
        return asyncio.run(_soak(directory, seconds, seed, redis, port))
