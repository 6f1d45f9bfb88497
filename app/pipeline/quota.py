"""What a caller's API key allows per minute, checked before anything is spent. Knows no HTTP.

With Redis, all processes share one limit. Redis is asked again after a tenth of a second, or once this process has
admitted its part of a hundredth of the limit: if the limit is small, or little of it is left, that is on every request.
Redis is told at once of corrections that exceed this part. What is certainly over the limit is refused without asking.
Without Redis, or while it is away, each process keeps to its own part of the limit.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from msgspec import Struct

from app import limits
from app.cache.shared_limits import Demand, SharedLimits
from app.clock import Clock
from app.errors import InvalidRequest, RateLimited
from app.limits import TICK, Bucket, Rates
from app.metrics import Metrics
from app.tasks import Tasks

_MAX_BODY_TOKENS = 2**13
"""The most tokens that a body of unknown content is taken for, to say when to retry: an image in it counts as
one."""
SLACK = 0.01
"""The share of a limit that all processes together may admit before Redis hears of it."""


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """One limit of a caller: how much a minute, what is left of it now, and the seconds until all of it is back."""

    kind: str
    """`requests` or `tokens`."""
    limit: int
    remaining: int
    reset: float


class Permit(Struct, eq=False):
    """What `Quota.admit` gives a request: it is counted by `take`, once its size is known, or else by `close`."""

    _quota: Quota
    _counted: bool = False

    async def take(self, tokens: int) -> None:
        """As `Quota.take`."""
        self._end()
        await self._quota.take(tokens)

    def correct(self, tokens: int) -> None:
        """Takes this many more tokens, where `take` was given too few; negative ones are given back."""
        self._quota.adjust(0, tokens)

    def close(self, *, counts: bool) -> None:
        """The request has ended. `counts`: whether as a request, if it was not counted before."""
        if not self._counted:
            self._end()
            if counts:
                self._quota.adjust(1, 0)

    def _end(self) -> None:
        self._counted = True
        self._quota._admitted -= 1  # it is this quota's other half


class Quota:
    """One caller's limits. `processes`: how many share them if there is no Redis."""

    def __init__(
        self,
        name: str,
        rates: Rates,
        clock: Clock,
        metrics: Metrics,
        shared: SharedLimits | None = None,
        processes: int = 1,
    ) -> None:
        self._key = b"caller:" + name.encode()
        self.rates, self._clock, self._shared = rates, clock, shared
        self._refused = metrics.rejected_requests.labels(RateLimited.code)
        now = clock.monotonic()
        self._limit = limits.burst_limit(rates, now)
        """With Redis, as of its last answer: no more is left by now, for others take from it."""
        if shared is None:
            self._limit.divide(processes, now)
        self._owed = [0.0, 0.0]
        """Requests and tokens counted here that are not reported to Redis yet."""
        self._admitted = 0
        """Requests that `admit` let in and that are not counted yet: their bodies are still to come."""
        self._asking = Tasks()
        self._known_until = 0.0
        """Until when the last answer of Redis holds, within the slack."""

    def admit(self, size: int) -> Permit:
        """Lets a request in. Raises `RateLimited` if not even the smallest fits beside those let in.
        Its `retry_after` is the time until this one fits, as far as its body's `size` tells: a token per three bytes,
        up to `_MAX_BODY_TOKENS`. Asks nobody."""
        now, requests = self._clock.monotonic(), self._limit.requests
        by_requests = requests.wait(now, 1, self._admitted) if requests else 0.0
        if by_requests or self._limit.wait(now, 1, 1):
            by_size = self._limit.wait(now, 1, min(max(1, size // 3), _MAX_BODY_TOKENS))
            raise self._rate_limited(max(by_requests, by_size), 1, by_requests=by_requests > 0)
        self._admitted += 1
        return Permit(self)

    async def take(self, tokens: int) -> None:
        """Counts one request of about this many tokens. Raises `RateLimited`, or `InvalidRequest` if it can never fit,
        which counts as a request."""
        most = self.rates.tokens
        if most is not None and tokens > most:
            self.adjust(1, 0)
            raise InvalidRequest(
                f"this request is about {tokens} tokens, more than the {most} tokens per minute of this API key; "
                "send fewer inputs at a time",
                param="input",
            )
        now = self._clock.monotonic()
        wait = self._limit.wait(now, 1, tokens)
        if wait:
            raise self._rate_limited(wait, tokens, by_requests=self._lacks_requests(now))
        if self._shared is None or self._covers(self._shared.replicas, tokens, now):
            self.adjust(1, tokens)
        else:
            # Goes on if the caller hangs up: what Redis has counted must not be reported to it again.
            if wait := await asyncio.shield(self._ask(self._shared, 1, tokens)):
                raise self._rate_limited(wait, tokens, by_requests=self._lacks_requests(self._clock.monotonic()))

    def adjust(self, requests: int, tokens: int) -> None:
        """Corrects what was unknown or wrong when the request was counted. Negative amounts are given back."""
        self._limit.take(self._clock.monotonic(), requests, tokens)
        if self._shared is not None:
            self._owed[0] += requests
            self._owed[1] += tokens
            bucket = self._limit.tokens
            if bucket and abs(self._owed[1]) * self._shared.replicas > SLACK * bucket.burst:
                # The next request may come much later: Redis would take this from what has been refilled since then,
                # and other replicas would not know of it.
                self._ask(self._shared, 0, 0)

    def limit_statuses(self) -> list[LimitStatus]:
        """The limits, by what is known here."""
        now = self._clock.monotonic()
        return [
            LimitStatus(kind, int(bucket.per_minute), max(0, int(bucket.level(now))), bucket.until_full(now))
            for kind, bucket in (("requests", self._limit.requests), ("tokens", self._limit.tokens))
            if bucket
        ]

    def _covers(self, replicas: int, tokens: int, now: float) -> bool:
        """Whether this certainly fits, by the last answer of Redis, and Redis need not hear of it at once."""
        if now >= self._known_until:
            return False
        for bucket, owed, amount in (
            (self._limit.requests, self._owed[0], 1),
            (self._limit.tokens, self._owed[1], tokens),
        ):
            if bucket is not None:
                slack = SLACK * bucket.burst
                if (owed + amount) * replicas > slack or bucket.level(now) - amount < slack:
                    return False
        return True

    def _ask(self, shared: SharedLimits, requests: int, tokens: int) -> asyncio.Task[float]:
        """Reports what is owed, and asks for these amounts. The result is the wait until they fit, 0 if taken."""
        owed = (self._owed[0], self._owed[1])
        self._owed = [0.0, 0.0]
        return self._asking.start(self._take_shared(shared, owed, (requests, tokens)))

    async def _take_shared(self, shared: SharedLimits, owed: tuple[float, float], amounts: tuple[int, int]) -> float:
        verdict = await shared.ask(self._key, self._limit, Demand(owed, amounts, amounts))
        now = self._clock.monotonic()
        if verdict is not None:
            if self._limit.requests:
                self._limit.requests.set(now, verdict.requests - self._owed[0])
            if self._limit.tokens:
                self._limit.tokens.set(now, verdict.tokens - self._owed[1])
            self._known_until = now + TICK
            return verdict.wait
        # Fails open, within this process's own part. Redis hears of it once it is back, but never of more than that
        # part. It may have counted this question and only answered late, so nothing is given back a second time.
        self._limit.divide(shared.replicas, now)
        wait = self._limit.wait(now, *amounts)
        taken = (0, 0) if wait else amounts
        self._limit.take(now, *taken)
        self._owed[0] = _capped(self._owed[0] + max(0.0, owed[0]) + taken[0], self._limit.requests)
        self._owed[1] = _capped(self._owed[1] + max(0.0, owed[1]) + taken[1], self._limit.tokens)
        return wait

    def _lacks_requests(self, now: float) -> bool:
        requests = self._limit.requests
        return requests is not None and requests.wait(now, 1) > 0

    def _rate_limited(self, wait: float, tokens: int, *, by_requests: bool) -> RateLimited:
        self._refused.inc()
        limit = f"{self.rates.requests} requests" if by_requests else f"{self.rates.tokens} tokens"
        asked = "" if by_requests or tokens <= 1 else f" and this request is about {tokens}"
        wait = math.ceil(round(100 * max(1.0, wait), 4)) / 100  # never too early, and no less than headers can say
        return RateLimited(f"this API key may use {limit} per minute{asked}; try again in {wait:g} s", retry_after=wait)


def _capped(amount: float, bucket: Bucket | None) -> float:
    return min(amount, bucket.max_level) if bucket else 0.0
