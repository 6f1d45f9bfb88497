"""Whether a deployment takes traffic, judged by nothing but the calls it gets anyway."""

from __future__ import annotations

from app.clock import Clock
from app.errors import GatewayError, InvalidRequest, QuotaExhausted, RateLimited
from app.metrics import Gauge

FAILURES = 5
"""In a row, after which a deployment leaves the rotation."""
SUSPECT = 1.0
"""Seconds after a failure in which others are asked first."""
EJECTION = 30.0
"""Seconds out of the rotation; twice, three times … as long each time it fails again at once."""
LONGEST = 10
"""Times `EJECTION`, at most."""
COOLING = 1.0
"""Seconds of rest after a rate limit that does not say how long."""


class Health:
    """One deployment's: in rotation, ejected, or cooling after a rate limit.

    An ejected one comes back by a single call: it succeeds, or the ejection begins anew and lasts longer.
    """

    def __init__(self, clock: Clock, gauge: Gauge) -> None:
        self._clock, self._gauge = clock, gauge
        self._failures = 0
        self._ejections = 0
        self._ejected_until = 0.0
        self._cooling_until = 0.0
        self._suspect_until = 0.0
        self._probing = False
        self.out: str | None = None
        """Why it takes no traffic until further notice, if it takes none."""
        self.used = False
        """Whether it has ever answered."""
        gauge.set(1)

    @property
    def suspect(self) -> bool:
        """Whether it has only just failed: then others are asked first, so that few retries are needed."""
        return self._clock.monotonic() < self._suspect_until

    def available(self) -> bool:
        """Whether it may have a call now; after an ejection, one call at a time."""
        if self._ejections and (self._probing or self._clock.monotonic() < self._ejected_until):
            return False
        return not self.cooling()

    def take_out(self, reason: str) -> None:
        """Out of the rotation, even as the last: what it would answer is worse than no answer."""
        self.out = reason
        self._gauge.set(0)

    def let_in(self) -> None:
        if self.out is not None:
            self.out = None
            self._gauge.set(0 if self._ejections else 1)

    def cooling(self) -> float:
        """Seconds until a rate limit has passed; 0 when there is none."""
        return max(0.0, self._cooling_until - self._clock.monotonic())

    def begin(self) -> None:
        """A call goes there."""
        self._probing = self._ejections > 0

    def end(self, error: GatewayError | None) -> None:
        """What the call came to. A refused input speaks for a deployment, not against it."""
        self._probing = False
        if error is None or isinstance(error, InvalidRequest):
            if self._ejections and not self.out:
                self._gauge.set(1)
            self._failures = self._ejections = 0
            self._suspect_until = 0.0
            self.used = True
        elif isinstance(error, RateLimited) and not isinstance(error, QuotaExhausted):
            wait = COOLING if error.retry_after is None else error.retry_after
            self._cooling_until = max(self._cooling_until, self._clock.monotonic() + wait)
        else:
            self._failures += 1
            self._suspect_until = self._clock.monotonic() + SUSPECT
            if self._failures >= FAILURES:
                self._eject()

    def _eject(self) -> None:
        self._ejections = min(self._ejections + 1, LONGEST)
        self._ejected_until = self._clock.monotonic() + EJECTION * self._ejections
        self._gauge.set(0)
