"""A circuit breaker: a tier that does not answer costs a few requests its time limit, not every one."""

from __future__ import annotations

from collections.abc import Callable

_FAILURES = 3
"""Consecutive failures that open the breaker."""
_FIRST_PAUSE, _MAX_PAUSE = 1.0, 30.0
"""Seconds the breaker stays open: the first time, and at most. The pause doubles with each failed probe."""


class Breaker:
    """Closed until `_FAILURES` consecutive failures, then open for a pause.

    After the pause it lets one caller at a time through as a probe; a success closes it. A caller that `allow` let
    through must report the outcome: `succeeded`, `failed` or `abandoned`.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._failures = 0
        self._pause = _FIRST_PAUSE
        self._open_until: float | None = None
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether the tier stopped answering, and has not answered since."""
        return self._open_until is not None

    def allow(self) -> bool:
        """Whether the caller may try the tier."""
        if self._open_until is None:
            return True
        if self._probing or self._now() < self._open_until:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """The tier answered: closes the breaker and resets its counts."""
        self._failures = 0
        if self.is_open:
            self._open_until = None
            self._probing = False
            self._pause = _FIRST_PAUSE

    def failed(self) -> None:
        """The tier did not answer. Calls that began before the breaker opened do not lengthen the pause."""
        self._failures += 1
        if self.is_open and not self._probing:
            return
        if self._probing:
            self._pause = min(self._pause * 2, _MAX_PAUSE)
        if self._failures >= _FAILURES:
            self._open_until = self._now() + self._pause
            self._probing = False

    def abandoned(self) -> None:
        """The caller left before the tier answered. That proves nothing: the next caller may probe."""
        self._probing = False
