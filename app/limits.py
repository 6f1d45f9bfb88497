"""Rate limits as token buckets: pure arithmetic on a clock's seconds. Knows neither callers nor a store."""

from __future__ import annotations

from dataclasses import dataclass

_TOLERANCE = 1e-6
"""How much may be missing without a wait: the rounding of floats."""
MAX_DEBT = 10
"""Minutes' worth of debt taken over from elsewhere, at most: until it is paid nobody asks there again, and by then what
was wrong there may have been put right."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a minute allows; None means no limit."""

    requests: int | None = None
    tokens: int | None = None

    def __bool__(self) -> bool:
        return self.requests is not None or self.tokens is not None


class Bucket:
    """A token bucket: fills continuously by `per_minute`, up to `burst`. It may be in debt, which is paid off before
    anything else fits.

    `now` is the seconds of any clock that never runs backwards.
    """

    __slots__ = ("_at", "_level", "_share", "burst", "per_minute")

    def __init__(self, per_minute: float, burst: float, now: float) -> None:
        self.per_minute, self.burst = per_minute, burst
        """Of the whole bucket, whatever the share."""
        self._share = 1
        self._level, self._at = burst, now

    @property
    def max_level(self) -> float:
        """The most this share holds."""
        return self.burst / self._share

    def level(self, now: float) -> float:
        """What the bucket holds; negative is debt."""
        return min(self.max_level, self._level + (now - self._at) * self.rate)

    def wait(self, now: float, amount: float, reserved: float = 0.0) -> float:
        """Seconds until `amount` fits beside what is reserved. More than the bucket can hold fits when it is full."""
        missing = min(amount, self.max_level) + reserved - self.level(now)
        return missing / self.rate if missing > _TOLERANCE else 0.0

    def take(self, now: float, amount: float) -> None:
        """Takes `amount`, even into debt; a negative amount is given back."""
        self._level, self._at = self.level(now) - amount, now

    def set(self, now: float, level: float) -> None:
        """Sets the level of the whole bucket, as counted elsewhere, down to `MAX_DEBT`."""
        self._share = 1
        self._level, self._at = max(level, -MAX_DEBT * self.per_minute), now

    def divide(self, share: int, now: float) -> None:
        """Makes this one of `share` equal parts, both of the level and of the rate."""
        if share != self._share:
            self._level, self._at = self.level(now) * self._share / share, now
            self._share = share

    def until_full(self, now: float) -> float:
        """Seconds until it is full."""
        return (self.max_level - self.level(now)) / self.rate

    @property
    def rate(self) -> float:
        """What this share gains per second."""
        return self.per_minute / 60 / self._share


@dataclass(slots=True)
class Limit:
    """A bucket of requests and one of tokens, each None if there is no such limit."""

    requests: Bucket | None
    tokens: Bucket | None

    def wait(self, now: float, requests: float, tokens: float) -> float:
        """Seconds until both fit."""
        longest = self.requests.wait(now, requests) if self.requests else 0.0
        return max(longest, self.tokens.wait(now, tokens)) if self.tokens else longest

    def take(self, now: float, requests: float, tokens: float) -> None:
        """Takes from both, even into debt; negative amounts are given back."""
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
    """For callers: one that has been idle may use a whole minute's worth at once."""
    return Limit(
        Bucket(rates.requests, rates.requests, now) if rates.requests else None,
        Bucket(rates.tokens, rates.tokens, now) if rates.tokens else None,
    )


TICK = 0.1
"""Seconds' worth that may go to an upstream at once: vendors that state a rate per minute enforce it by the second.
Also the seconds after which Redis is asked again what other replicas have used of a limit."""


def smooth_limit(rates: Rates, now: float) -> Limit:
    """For upstreams: one call and a tenth of a second's worth at once, everything else evenly spaced."""
    return Limit(
        Bucket(rates.requests, 1 + rates.requests / 60 * TICK, now) if rates.requests else None,
        Bucket(rates.tokens, 1 + rates.tokens / 60 * TICK, now) if rates.tokens else None,
    )
