"""Rates as token buckets: pure arithmetic on a clock's seconds. Knows neither callers nor a store."""

from __future__ import annotations

from dataclasses import dataclass

_ENOUGH = 1e-6
"""How much may be missing without a wait: it is a float's rounding."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a minute allows; None is no limit."""

    requests: int | None = None
    tokens: int | None = None

    def __bool__(self) -> bool:
        return self.requests is not None or self.tokens is not None


class Bucket:
    """Fills continuously by `per_minute`, up to `burst`; may be in debt, and is paid off before anything else fits.

    `now` is any clock's seconds that never run backwards.
    """

    __slots__ = ("_at", "_level", "_share", "burst", "per_minute")

    def __init__(self, per_minute: float, burst: float, now: float) -> None:
        self.per_minute, self.burst = per_minute, burst
        """The whole, whatever the share."""
        self._share = 1
        self._level, self._at = burst, now

    @property
    def max_level(self) -> float:
        """The most this share holds."""
        return self.burst / self._share

    def level(self, now: float) -> float:
        """What is there; negative is debt."""
        return min(self.max_level, self._level + (now - self._at) * self.rate)

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` is there. More than the bucket holds is there when it is full."""
        short = min(amount, self.max_level) - self.level(now)
        return short / self.rate if short > _ENOUGH else 0.0

    def take(self, now: float, amount: float) -> None:
        """Takes it, there or not; a negative amount is given back."""
        self._level, self._at = self.level(now) - amount, now

    def set(self, now: float, level: float) -> None:
        """What is there by somebody else's count, of the whole."""
        self._share = 1
        self._level, self._at = level, now

    def divide(self, share: int, now: float) -> None:
        """From now on this is one of `share` equal parts, of what is there as well as of what comes."""
        if share != self._share:
            self._level, self._at = self.level(now) * self._share / share, now
            self._share = share

    def until_full(self, now: float) -> float:
        """Seconds until it is at rest."""
        return (self.max_level - self.level(now)) / self.rate

    @property
    def rate(self) -> float:
        """What comes in a second, of this share."""
        return self.per_minute / 60 / self._share


@dataclass(slots=True)
class Limit:
    """A bucket of requests and one of tokens; each only where there is such a limit."""

    requests: Bucket | None
    tokens: Bucket | None

    def wait(self, now: float, requests: float, tokens: float) -> float:
        """Seconds until both fit."""
        longest = self.requests.wait(now, requests) if self.requests else 0.0
        return max(longest, self.tokens.wait(now, tokens)) if self.tokens else longest

    def take(self, now: float, requests: float, tokens: float) -> None:
        """Takes from both, there or not; negative amounts are given back."""
        if self.requests:
            self.requests.take(now, requests)
        if self.tokens:
            self.tokens.take(now, tokens)

    def divide(self, share: int, now: float) -> None:
        """Both as `Bucket.divide`."""
        for bucket in (self.requests, self.tokens):
            if bucket:
                bucket.divide(share, now)


def burst_limit(rates: Rates, now: float) -> Limit:
    """For callers: one that was quiet may use a whole minute's worth at once."""
    return Limit(
        Bucket(rates.requests, rates.requests, now) if rates.requests else None,
        Bucket(rates.tokens, rates.tokens, now) if rates.tokens else None,
    )


TICK = 0.1
"""Seconds' worth that may go at once to an upstream: vendors that state a minute's rate enforce it by the second. And
seconds after which what other replicas have used of a limit is asked for again."""


def smooth_limit(rates: Rates, now: float) -> Limit:
    """For upstreams: one call, and a tenth of a second's worth, at once; all else evenly."""
    return Limit(
        Bucket(rates.requests, 1 + rates.requests / 60 * TICK, now) if rates.requests else None,
        Bucket(rates.tokens, 1 + rates.tokens / 60 * TICK, now) if rates.tokens else None,
    )
