"""Stops asking a tier that does not answer, so that its silence is paid for a few times and not on every request."""

from __future__ import annotations

from collections.abc import Callable


class Breaker:
    """Closed until `threshold` failures in a row; then open for `first` seconds, doubling up to `longest`.

    When that time is over, one caller at a time is let through; its success closes the breaker. Whoever was let
    through (`allow` gave True) must say how it went: `succeeded`, `failed`, or `abandoned`.
    """

    def __init__(self, now: Callable[[], float], threshold: int = 3, first: float = 1.0, longest: float = 30.0) -> None:
        self._now = now
        self._threshold = threshold
        self._first = first
        self._longest = longest
        self._failures = 0
        self._pause = first
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
            self._pause = self._first

    def failed(self) -> None:
        """It did not answer. Failures of calls that began before it opened do not lengthen the pause."""
        self._failures += 1
        if self._until is not None and not self._probing:
            return
        if self._probing:
            self._pause = min(self._pause * 2, self._longest)
        if self._failures >= self._threshold:
            self._until = self._now() + self._pause
            self._probing = False

    def abandoned(self) -> None:
        """The caller left before there was an answer: it proves nothing, and the next one may try."""
        self._probing = False
