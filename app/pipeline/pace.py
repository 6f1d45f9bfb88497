"""The rate at which calls go to an upstream, kept by waiting. Knows no queue: those who wait are called back.

A call may start while the balance is positive, and is charged once it is known what it carries. The balance may then
be negative, and the next call waits longer: on average the rate is kept exactly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from app import limits
from app.cache.shared_limits import Demand, SharedLimits
from app.clock import Clock
from app.limits import MAX_DEBT, TICK, Limit, Rates

MIN_FACTOR = 1 / 8
"""The least share of the configured rate, after the upstream has refused it again and again."""
RECOVERY = 0.05
"""The share of the configured rate that each success regains."""
REDIS_RETRY = 1.0
"""Seconds that a replica whose Redis does not answer keeps to its own part of the rate before it asks again."""
CALL_SECONDS = 2.0
"""Seconds' worth of tokens that one call may carry: a query waits this long when bulk work has just taken them."""
REDIS_REPLY = 0.05
"""Seconds within which an answer from Redis is expected. Those who wait are called back when it has come."""


class Pace:
    """One upstream's pace, for all its models. `on_ready` is called when a call may have become possible before the
    time that `wait` gave.

    With Redis, calls are leased a tenth of a second's worth at a time, so that most need no round trip. Without it,
    or while it is away, each process keeps to its part of the rate.
    """

    def __init__(
        self,
        name: str,
        rates: Rates,
        clock: Clock,
        shared: SharedLimits | None = None,
        processes: int = 1,
        before: Pace | None = None,
    ) -> None:
        """`before`: a pace of the same rates that is still in use; what is sent by either counts for both."""
        self._clock = clock
        if before is None:
            self._limit = limits.smooth_limit(rates, clock.monotonic())
            self._limit.divide(processes, clock.monotonic())
            self._factor = 1.0
        else:
            self._limit, self._factor = before._limit, before._factor
        self._lease = _Lease(name, rates, self._limit, shared) if shared else None
        self._renewal: asyncio.Task[None] | None = None
        self._alone_until: float | None = None
        self._refused_until = 0.0
        self.on_ready: Callable[[], None] = lambda: None

    def wait(self) -> float:
        """Seconds until a call may start; 0: now. An estimate if Redis has to be asked first."""
        now = self._clock.monotonic()
        lease = self._lease
        if lease is None:
            return self._limit.wait(now, 1, 1)
        if self._alone_until is not None:
            if now >= self._alone_until:
                self._renew(lease)
            return self._limit.wait(now, 1, 1)
        if lease.covers_a_call():
            return 0.0
        if now < self._refused_until:
            return self._refused_until - now
        self._renew(lease)
        return REDIS_REPLY

    def charge(self, requests: float, tokens: float) -> None:
        """Charges calls, and tokens once they are known; negative tokens are given back."""
        requests, tokens = requests / self._factor, tokens / self._factor
        if self._lease is None or self._alone_until is not None:
            self._limit.take(self._clock.monotonic(), requests, tokens)
            return
        self._lease.use(requests, tokens)
        if self._lease.in_debt():
            self._renew(self._lease)  # the other replicas must know at once what this one has used

    def tokens_per_call(self) -> float | None:
        """Tokens that one call may carry; None if tokens are not counted. `CALL_SECONDS` worth of them, or more if
        calls must carry more to use up the rate of tokens within the rate of calls."""
        calls, tokens = self._limit.requests, self._limit.tokens
        if tokens is None:
            return None
        return max(tokens.rate * self._factor * CALL_SECONDS, tokens.rate / calls.rate if calls else 0.0)

    def time_for(self, requests: float, tokens: float) -> float:
        """Seconds until a call may start after this much, beginning now."""
        rates = ((requests, self._limit.requests), (tokens, self._limit.tokens))
        longest = max((amount * 60 / bucket.per_minute for amount, bucket in rates if bucket), default=0.0)
        return self.wait() + longest / self._factor

    def slow_down(self) -> None:
        """The upstream has refused the rate: halves it."""
        self._factor = max(MIN_FACTOR, self._factor / 2)

    def recover(self) -> None:
        """A call succeeded: regains `RECOVERY` of the rate, up to the whole."""
        self._factor = min(1.0, self._factor + RECOVERY)

    async def aclose(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait([self._renewal])

    def _renew(self, lease: _Lease) -> None:
        if self._renewal is None:
            self._renewal = asyncio.get_running_loop().create_task(self._ask(lease))

    async def _ask(self, lease: _Lease) -> None:
        try:
            wait = await lease.renew()
        finally:
            self._renewal = None
        now = self._clock.monotonic()
        if wait is None:
            self._limit.divide(lease.shared.replicas, now)
            self._alone_until = now + REDIS_RETRY
        else:
            self._alone_until = None
            self._refused_until = now + min(wait, 60 * MAX_DEBT)
            if lease.in_debt():  # since Redis was asked
                self._renew(lease)
        self.on_ready()


class _Lease:
    """Calls and tokens that Redis has granted this replica, less those it has used."""

    def __init__(self, name: str, rates: Rates, limit: Limit, shared: SharedLimits) -> None:
        self.shared = shared
        self._key, self._limit = b"upstream:" + name.encode(), limit
        self._size = (_lease_size(rates.requests), _lease_size(rates.tokens))
        self.requests = self.tokens = 0.0

    def covers_a_call(self) -> bool:
        requests, tokens = self._limit.requests, self._limit.tokens
        return (requests is None or self.requests >= 1) and (tokens is None or self.tokens > 0)

    def use(self, requests: float, tokens: float) -> None:
        self.requests -= requests if self._limit.requests else 0
        self.tokens -= tokens if self._limit.tokens else 0

    def in_debt(self) -> bool:
        return self.requests < 0 or self.tokens < 0

    async def renew(self) -> float | None:
        """Reports what was used beyond the lease, and asks for more. Returns the seconds until there is some, 0 if it
        was granted; None if Redis does not answer."""
        owed = (max(0.0, -self.requests), max(0.0, -self.tokens))
        requests, tokens = self._size
        take = (requests if self.requests < requests else 0.0, tokens if self.tokens < tokens else 0.0)
        verdict = await self.shared.ask(self._key, self._limit, Demand(owed, (1.0, 1.0), take))
        if verdict is None:
            self.requests = self.tokens = 0.0
            return None
        self.requests += owed[0]
        self.tokens += owed[1]
        if verdict.wait == 0:
            self.requests += take[0]
            self.tokens += take[1]
        return verdict.wait


def _lease_size(per_minute: int | None) -> float:
    return max(1.0, per_minute / 60 * TICK) if per_minute else 0.0
