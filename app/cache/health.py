"""What is wrong with a slow tier: logged now and then, shown by `/readyz` while it lasts."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable

from app.logs import Seldom

log = logging.getLogger(__name__)

_SHOWN_AS = {"set": "writes", "claim": "claims"}
"""Operations whose failure leaves the tier up for lookups, by the name shown in `status`."""
_MAX_MESSAGE = 200
"""Characters of an error message that are shown."""


def describe_error(error: BaseException) -> str:
    """The exception's type and message, without quoted arguments: servers quote the arguments of commands they do not
    know, and those of AUTH hold a password."""
    message = str(error).partition(", with args")[0][:_MAX_MESSAGE]
    return f"{type(error).__name__}: {message}"


class Outage:
    """Whether to log that something fails, once a minute however often it comes and goes, and that it works
    again, if its failure was logged. `now` returns the seconds of a monotonic clock."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._seldom = Seldom(now)
        self._logged: str | None = None

    def failing(self, why: str) -> bool:
        """It fails: whether to log that. A reason that was logged is not logged again before it has worked."""
        if why == self._logged or not self._seldom():
            return False
        self._logged = why
        return True

    def recovered(self) -> bool:
        """It works: whether to log that."""
        logged, self._logged = self._logged, None
        return logged is not None


class TierHealth:
    """What is wrong with one tier, by operation."""

    def __init__(self, tier: str, now: Callable[[], float]) -> None:
        self._tier = tier
        self._reasons: dict[str, str] = {}
        self._outages: dict[str, Outage] = defaultdict(lambda: Outage(now))

    @property
    def status(self) -> str:
        """ "up", "down: REASON" if lookups fail, or "up; writes fail: REASON" (or claims)."""
        if "get" in self._reasons:
            return f"down: {self._reasons['get']}"
        for operation, shown in _SHOWN_AS.items():
            if operation in self._reasons:
                return f"up; {shown} fail: {self._reasons[operation]}"
        return "up"

    def failing(self, operation: str, why: str, level: int = logging.WARNING) -> None:
        """The operation fails, for this reason."""
        self._reasons[operation] = why
        if self._outages[operation].failing(why):
            log.log(level, "%s cache: %s fails, requests are served without it: %s", self._tier, operation, why)

    def recovered(self, operation: str) -> None:
        """The operation works."""
        if self._reasons.pop(operation, None) is not None and self._outages[operation].recovered():
            log.warning("%s cache: %s works again", self._tier, operation)
