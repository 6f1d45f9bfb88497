"""A clock that a test moves by hand: a task that sleeps on it wakes once it has been moved far enough."""

from __future__ import annotations

import asyncio


class HandClock:
    """Stands still until it is moved. Call `advance` in the event loop of the sleeping tasks."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._sleeping: list[tuple[float, asyncio.Future[None]]] = []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1_800_000_000.0 + self.now

    async def sleep(self, seconds: float) -> None:
        wakes = asyncio.get_running_loop().create_future()
        self._sleeping.append((self.now + seconds, wakes))
        await wakes

    @property
    def sleepers(self) -> int:
        """Tasks that sleep on it."""
        return len(self._sleeping)

    async def advance(self, seconds: float) -> None:
        """Moves the clock, then lets every task run as far as it can."""
        self.now += seconds
        due = [wakes for at, wakes in self._sleeping if at <= self.now]
        self._sleeping = [(at, wakes) for at, wakes in self._sleeping if at > self.now]
        for wakes in due:
            if not wakes.done():
                wakes.set_result(None)
        await settle()


async def settle() -> None:
    """Lets every task run until it waits for something outside the event loop."""
    for _ in range(20):
        await asyncio.sleep(0)
