"""The faults injected during a soak: which, when, and what errors they explain."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from tests.fakes import faults
from tests.fakes.faults import Fault
from tests.redis_server import RedisServer
from tests.soak.tcp_proxy import CALM, TcpProxy, Trouble
from tests.soak.vendors import Vendor

GRACE = 3.0
"""Seconds after a trouble in which its errors may still appear: a rate-limited deployment rests for two."""
STORM, LULL = 14.0, 6.0
"""Seconds with troubles and seconds without, in turn."""


@dataclass(frozen=True)
class Kind:
    """One kind of trouble with an upstream, and the statuses that callers may see because of it."""

    name: str
    statuses: frozenset[int]
    fault: Fault | None = None
    trouble: Trouble = CALM
    sever: bool = False


def _vendor(name: str, *statuses: int) -> Kind:
    return Kind(name, frozenset(statuses), faults.vendor_error(name))


def _kinds() -> Iterable[Kind]:
    broken, slow = frozenset({502, 503}), frozenset({502, 503, 504})  # 503 once it has lasted a while
    yield _vendor("rate_limit", 429, 503, 504)  # Ollama's is a full queue
    yield _vendor("quota", 429)
    yield _vendor("auth", 502)
    yield _vendor("unavailable", 503)
    yield _vendor("internal", 502, 503)
    yield _vendor("bad_input", 400, 502)  # Ollama's message is about the request's form, which is our fault
    for fault in (*faults.PAYLOAD_FAULTS, *faults.BROKEN_TRANSFERS, *faults.BROKEN_BODIES):
        yield Kind(fault.name, broken, fault)
    yield Kind("redirect", broken, faults.redirect("http://127.0.0.1:9/"))
    yield Kind("wrong_content_type", broken, faults.wrong_content_type)
    for harmless in (faults.close_after_answer, faults.stale_keep_alive):
        yield Kind(harmless.name, frozenset(), harmless)
    for endless in (faults.hang, faults.dribble(0.05)):
        yield Kind(endless.name, slow, endless)
    yield Kind("network delay", slow, trouble=Trouble(delay=0.2))
    yield Kind("network stall", slow, trouble=Trouble(delay=3.0))
    yield Kind("network cuts", broken, trouble=Trouble(cut=0.1))
    yield Kind("network refuses", broken, trouble=Trouble(refuse=True), sever=True)
    yield Kind("network severed", broken, sever=True)


KINDS = tuple(_kinds())


@dataclass
class Spell:
    """A period in which an upstream was in trouble; `end` is infinite until it is over."""

    kind: Kind
    start: float
    end: float = float("inf")


class Weather:
    """Random troubles, seeded: one at a time per upstream, and Redis independently of them."""

    def __init__(self, vendors: Iterable[Vendor], redis: RedisServer, redis_proxy: TcpProxy, seed: int) -> None:
        self.vendors = list(vendors)
        self.faults: Counter[str] = Counter()
        self._redis, self._redis_proxy, self._seed = redis, redis_proxy, seed
        self._spells: dict[str, list[Spell]] = {vendor.name: [] for vendor in self.vendors}
        self._began = time.monotonic()

    def explains(self, status: int, vendors: Iterable[Vendor], start: float, end: float) -> bool:
        """Whether some trouble explains an error of a request that ran from `start` to `end`."""
        return any(
            status in spell.kind.statuses and spell.start <= end and start <= spell.end + GRACE
            for vendor in vendors
            for spell in self._spells[vendor.name]
        )

    async def blow(self, seconds: float) -> None:
        """Injects troubles for this long, and leaves none behind."""
        self._began = time.monotonic()
        until = self._began + seconds
        await asyncio.gather(*(self._trouble(vendor, until) for vendor in self.vendors), self._trouble_redis(until))

    async def _pause(self, rng: random.Random, until: float) -> bool:
        """Waits until the next trouble is due, after the lull if there is one; returns whether time is left for it."""
        await asyncio.sleep(rng.uniform(0.1, 2.5))
        phase = (time.monotonic() - self._began) % (STORM + LULL)
        if phase > STORM:
            await asyncio.sleep(max(0.0, min(STORM + LULL - phase, until - time.monotonic())))
        return time.monotonic() < until

    async def _trouble(self, vendor: Vendor, until: float) -> None:
        rng = random.Random(f"{self._seed}/weather/{vendor.name}")
        while await self._pause(rng, until):
            kind = rng.choice(KINDS)
            spells = self._spells[vendor.name]
            spells[:] = [spell for spell in spells if spell.end > time.monotonic() - 60]
            spell = Spell(kind, time.monotonic())
            spells.append(spell)
            before = len(vendor.fake.calls)
            self._begin(vendor, kind, rng)
            await asyncio.sleep(rng.uniform(0.1, 1.2))
            vendor.fake.heal()
            vendor.proxy.trouble = CALM
            spell.end = time.monotonic()
            self._count(vendor, kind, before)

    def _begin(self, vendor: Vendor, kind: Kind, rng: random.Random) -> None:
        if kind.fault is not None:
            vendor.fake.fail(kind.fault, rng.choice((1, 2, 5, None)))
        vendor.proxy.trouble = kind.trouble
        if kind.sever:
            vendor.proxy.sever()

    def _count(self, vendor: Vendor, kind: Kind, before: int) -> None:
        calls = vendor.fake.calls[before:]
        played = sum(call.fault == kind.fault.name for call in calls) if kind.fault else 1
        if played:
            self.faults[kind.name] += played
        del vendor.fake.calls[:], vendor.fake.requests[:]  # hours of them would fill memory

    async def _trouble_redis(self, until: float) -> None:
        rng = random.Random(f"{self._seed}/weather/redis")

        async def paused(seconds: float) -> None:
            self._redis.pause()
            await asyncio.sleep(seconds)
            self._redis.resume()

        async def killed(seconds: float) -> None:
            await asyncio.to_thread(self._redis.kill)
            await asyncio.sleep(seconds)
            await asyncio.to_thread(self._redis.start)

        def network(trouble: Trouble) -> Callable[[float], Awaitable[None]]:
            async def troubled(seconds: float) -> None:
                self._redis_proxy.trouble = trouble
                await asyncio.sleep(seconds)
                self._redis_proxy.trouble = CALM

            return troubled

        async def severed(_: float) -> None:
            self._redis_proxy.sever()

        kinds: dict[str, Callable[[float], Awaitable[None]]] = {
            "redis paused": paused,
            "redis killed": killed,
            "redis slow": network(Trouble(delay=0.1)),
            "redis cuts": network(Trouble(cut=0.1)),
            "redis refuses": network(Trouble(refuse=True)),
            "redis severed": severed,
        }
        while await self._pause(rng, until):
            name = rng.choice(sorted(kinds))
            await kinds[name](rng.uniform(0.1, 1.5))
            self.faults[name] += 1
