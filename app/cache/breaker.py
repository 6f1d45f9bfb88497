"""Stops asking a tier that does not answer, so that its silence is paid for a few times and not on every request."""

from __future__ import annotations

from collections.abc import Callable

_FAILURES = 3
"""In a row, until it opens."""
_FIRST, _LONGEST = 1.0, 30.0
"""Seconds that it stays open at first; they double with each try that fails, up to the longest."""


class Breaker:
    """Closed until `_FAILURES` failures in a row; then open for a while.

    When that time is over, one caller at a time is let through; its success closes the breaker. Whoever was let
    through (`allow` gave True) must say how it went: `succeeded`, `failed`, or `abandoned`.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._failures = 0
        self._pause = _FIRST
        self._until: float | None = None
        self._probing = False

    def allow(self) -> bool:
        """Whether to try."""
        if self._until is None:
            return True
        if self._probing or self._now() < self._until:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """It answered: closed, and all is forgotten."""
        self._failures = 0
        if self._until is not None:
            self._until = None
            self._probing = False
            self._pause = _FIRST

    def failed(self) -> None:
        """It did not answer. Failures of calls that began before it opened do not lengthen the pause."""
        self._failures += 1
        if self._until is not None and not self._probing:
            return
        if self._probing:
            self._pause = min(self._pause * 2, _LONGEST)
        if self._failures >= _FAILURES:
            self._until = self._now() + self._pause
            self._probing = False

    def abandoned(self) -> None:
        """The caller left before there was an answer: it proves nothing, and the next one may try."""
        self._probing = False
