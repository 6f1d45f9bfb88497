"""A soak: the program under mixed traffic while everything around it fails, and what must hold in the end.

No vector is wrong, no error is without a trouble that explains it, memory and descriptors are flat.
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

CALLERS = 24
WARM_UP = 0.25
"""Share of the time after which memory and descriptors must grow no more."""
MEMORY = 32 * 2**20
"""Bytes by which the program may grow all the same: what allocators keep, and the cache filling up."""
DESCRIPTORS = 32
"""Connections that may be kept open besides: the pools to upstreams and Redis are not always equally full."""
_TROUBLE = re.compile(r"Traceback|Exception in|never retrieved|level=(error|critical)")


@dataclass
class Footprint:
    """What a process holds. Zeros where the machine does not tell."""

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
    """What a soak found."""

    seed: int
    seconds: float
    tally: Tally
    faults: Counter[str]
    before: Footprint
    after: Footprint
    exit_code: int | None
    logged: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """All that must not be; empty after a good soak."""
        tally = self.tally
        found = [*tally.wrong, *tally.unexplained, *self.logged]
        if self.after.memory - self.before.memory > MEMORY:
            found.append(f"memory grew from {self.before.memory >> 20} to {self.after.memory >> 20} MiB")
        if self.after.descriptors - self.before.descriptors > DESCRIPTORS:
            found.append(f"descriptors grew from {self.before.descriptors} to {self.after.descriptors}")
        if self.exit_code != 0:
            found.append(f"the program ended with {self.exit_code}")
        if not (tally.vectors and self.faults and tally.hung_up):
            found.append("nothing was tried")
        return found

    def summary(self) -> str:
        tally, before, after = self.tally, self.before, self.after
        return (
            f"soak {self.seconds:.0f} s, seed {self.seed}: {tally.requests} requests, "
            f"{tally.vectors} vectors verified, {tally.bad['wrong']} wrong; "
            f"{sum(self.faults.values())} faults of {len(self.faults)} kinds, "
            f"{sum(tally.errors.values())} errors explained by them, {tally.bad['unexplained']} unexplained, "
            f"{tally.bad['lost']} lost; {tally.hung_up} hang-ups; "
            f"memory {before.memory >> 20} -> {after.memory >> 20} MiB, "
            f"descriptors {before.descriptors} -> {after.descriptors}"
        )


async def _soak(directory: Path, seconds: float, seed: int, redis: RedisServer, port: int) -> Report:
    """Runs for about so long. `redis` is running, on `port`; files go to `directory`."""
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(vendors(seed))
        proxy = TcpProxy(port, random.Random(f"{seed}/proxy/redis"))
        await stack.enter_async_context(proxy)
        config = configuration(served, proxy.port)
        (directory / "gateway.yaml").write_text(yaml.safe_dump(config))
        process = start(directory, "--port", "0", "--config", "gateway.yaml", "--log-format", "text")
        stack.push_async_callback(_end, process)
        url = await asyncio.to_thread(address, directory / "log", process)
        weather = Weather(served.values(), redis, proxy, seed)
        tally = Tally()
        run = _Run(f"{url}/v1/embeddings", targets(served), weather, tally, seed)
        await run.storm(seconds * WARM_UP, "warm-up")
        before = Footprint.of(process.pid)
        await run.storm(seconds * (1 - WARM_UP), "main", then_all_is_well=True)
        after = Footprint.of(process.pid)
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, PATIENCE)
        logged = [line for line in (directory / "log").read_text().splitlines() if _TROUBLE.search(line)]
    return Report(seed, time.monotonic() - began, tally, weather.faults, before, after, code, logged[:20])


@dataclass
class _Run:
    url: str
    targets: list[Target]
    weather: Weather
    tally: Tally
    seed: int

    async def storm(self, seconds: float, name: str, *, then_all_is_well: bool = False) -> None:
        """Traffic and troubles; then, if that is asked for, quiet, in which every model must answer."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            callers = [self._caller(f"{self.seed}/{name}/{number}") for number in range(CALLERS)]
            end = time.monotonic() + seconds
            await asyncio.gather(self.weather.blow(seconds), *(each.call_until(end, session) for each in callers))
            if then_all_is_well:
                await asyncio.sleep(GRACE)
            for target in self.targets if then_all_is_well else ():
                await self._caller(f"{self.seed}/{name}/after", [target]).see_it_through(session)
        await asyncio.sleep(0.2)  # for the connections to be closed on the other side as well

    def _caller(self, seed: str, targets: list[Target] | None = None) -> Caller:
        return Caller(self.url, targets or self.targets, self.weather, self.tally, seed)


async def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        await asyncio.to_thread(process.wait, PATIENCE)


def run(directory: Path, seconds: float, seed: int) -> Report:
    """A whole soak."""
    port = free_port()
    with RedisServer(port=port) as redis:
        return asyncio.run(_soak(directory, seconds, seed, redis, port))
