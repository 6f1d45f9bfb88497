"""What is wrong with a slow tier, told to the log when it changes and to `/readyz` while it lasts."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

_TOLD = {"set": "writes", "claim": "claims"}
"""Operations that leave a tier up for look-ups, as readers call them."""


_LONGEST = 200
"""Characters of a message that are told."""


def describe_error(error: BaseException) -> str:
    """Type and message. Servers quote what they were sent and do not know, a password behind AUTH for example: that
    stays out."""
    words = str(error).partition(", with args")[0][:_LONGEST]
    return f"{type(error).__name__}: {words}"


class TierHealth:
    """What is wrong with one tier, by operation."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._reasons: dict[str, str] = {}

    @property
    def status(self) -> str:
        """ "up", or "down: " and why look-ups fail, or "up; writes fail: " (or claims) and why."""
        if "get" in self._reasons:
            return f"down: {self._reasons['get']}"
        for operation, describe_error in _TOLD.items():
            if operation in self._reasons:
                return f"up; {describe_error} fail: {self._reasons[operation]}"
        return "up"

    def failing(self, operation: str, why: str, level: int = logging.WARNING) -> None:
        """It fails, for this reason, which is logged unless it was the last time."""
        if self._reasons.get(operation) != why:
            self._reasons[operation] = why
            log.log(level, "%s cache: %s fails, requests are served without it: %s", self._tier, operation, why)

    def recovered(self, operation: str) -> None:
        """It works."""
        if self._reasons.pop(operation, None) is not None:
            log.warning("%s cache: %s works again", self._tier, operation)
