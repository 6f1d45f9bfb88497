"""What operators see and hear of a deployment: in `/readyz`, in the log and in the metrics. Decides nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

from app.clock import Clock
from app.errors import RateLimited
from app.logs import Seldom

log = logging.getLogger(__name__)

LONG_REST = 30.0
"""Seconds after which operators are told of a rest, or of rests in a row with no other answer between them."""
LENGTH_CHANGE_SHOWN = 60.0
"""Seconds for which `/readyz` shows that vectors have changed their length."""


class Trouble:
    """One deployment's trouble. Each kind of it, mostly an error's code, is logged at most once a minute."""

    def __init__(self, clock: Clock, report: Callable[[bool], None], name: str) -> None:
        """`report` is called with whether the deployment takes traffic."""
        self._clock, self._report, self._name = clock, report, name
        self.lasting: str | None = None
        """What needs an operator, or why it was ejected, since it last answered."""
        self.rest = ""
        """Its last rest: if that is long, or if there has long been nothing but rests."""
        self._limited_since: float | None = None
        """When it was first rate-limited since its last answer."""
        self.on_length_change: Callable[[], None] = lambda: None
        """Called when its vectors have changed their length."""
        self._length_change = ""
        self._length_change_until = 0.0
        self._seldom = Seldom(clock.monotonic)
        self._retired = False

    @property
    def length_change(self) -> str | None:
        """How the length of its vectors has changed, if that was a moment ago."""
        return self._length_change if self._clock.monotonic() < self._length_change_until else None

    def note(self, kind: str, problem: str) -> None:
        """Kept until it answers, and logged when it begins."""
        if self.lasting is None:
            self.warn(kind, problem)
        self.lasting = problem

    def warn(self, kind: str, problem: str) -> None:
        """Logs the problem and does not keep it."""
        if self._seldom(kind):
            self._log("%s: %s", self._name, problem)

    def note_rest(self, error: RateLimited, seconds: float) -> None:
        """It rests for this long after a rate limit. A short rest among answers is no trouble."""
        now = self._clock.monotonic()
        if self._limited_since is None:
            self._limited_since = now
        limited = now - self._limited_since
        if seconds >= LONG_REST:
            self.rest = f"{error.code}: {error.message}; it has no call for {seconds:g} s"
        elif limited >= LONG_REST:
            self.rest = f"{error.code}: {error.message}; no other answer for {limited:.0f} s"
        else:
            return
        self.warn(error.code, self.rest)

    def note_length_change(self, before: int, after: int) -> None:
        """Its vectors have `after` dimensions instead of `before`. Shown for a while: two models may take turns."""
        lengths = f"{after} dimensions, not {before} as before"
        self._length_change = f"its vectors have {lengths}: another model may have taken its place"
        self._length_change_until = self._clock.monotonic() + LENGTH_CHANGE_SHOWN
        self.warn("length", self._length_change)
        if not self._retired:
            self.on_length_change()

    def note_ejection(self, problem: str, seconds: float, failures: int) -> None:
        """It is called only if no other can be for this long, after so many failures, the last of which is
        `problem`."""
        self.lasting = problem
        self._log(
            "%s has failed %d times in a row and is tried last for %g s; the last: %s",
            self._name,
            failures,
            seconds,
            problem,
        )

    def answered(self, *, after_ejection: bool) -> None:
        """It has answered a call: all but a changed length is over."""
        if after_ejection:
            self._log("%s answers again", self._name)
        self.lasting = self._limited_since = None
        self.rest = ""

    def show(self, available: bool) -> None:
        """Reports whether it takes traffic."""
        if not self._retired:
            self._report(available)

    def retire(self) -> None:
        """It gets no more calls. Of those in flight nothing is reported or logged: its name may be another's by now."""
        self._retired = True

    def _log(self, message: str, *values: object) -> None:
        if not self._retired:
            log.warning(message, *values)
