"""Time, injected: expiries, breakers and signatures read it here, and tests advance it by hand."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds, for expiries and intervals; the wall clock may jump."""
        ...

    def time(self) -> float:
        """Seconds since the epoch, for what goes on the wire or on disk."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The real one."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
