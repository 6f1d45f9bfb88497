"""Whether a deployment takes traffic, judged by the calls it gets anyway."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from app.clock import Clock
from app.errors import GatewayError, InvalidRequest, RateLimited, UpstreamUnreachable

log = logging.getLogger(__name__)

FAILURES = 5
"""In a row, after which a deployment leaves the rotation."""
SUSPECT = 1.0
"""Seconds after a failure in which others are asked first."""
DOUBTFUL = 10.0
"""The same, after a reply that lacked what another one has: that may be its way, and retries are few."""
EJECTION = 30.0
"""Seconds out of the rotation; twice, three times … as long each time it fails again at once."""
MOST_EJECTIONS = 10
"""Times `EJECTION`, at most."""
COOLING = 1.0
"""Seconds of rest after a rate limit that does not say how long."""
LONGEST_REST = 300.0
"""Seconds of rest at the most. What an upstream says may be a date that it took for a number of seconds."""
FADES = 0.98
"""What each further call leaves of the longest one's time, which is forgotten slowly: short calls between long ones say
little of these."""
DOUBTED = 0.8
"""What a call that got no answer in its time leaves of it."""
TIME_ENOUGH = 30.0
"""Seconds in which a call should be answered, however long they may take."""
LONG_REST = 30.0
"""Seconds of rest from which an operator is told."""
QUIET = 60.0
"""Seconds in which the log is told of trouble once, where it comes and goes."""


class Health:
    """One deployment's: in rotation, ejected, or cooling after a rate limit.

    An ejected one comes back by a single call: it succeeds, or the ejection begins anew and lasts longer.
    """

    def __init__(self, clock: Clock, tell: Callable[[bool], None], name: str) -> None:
        """`tell` is told whether it takes traffic; `name`: the deployment's, for the log."""
        self._clock, self._tell_metrics, self._name = clock, tell, name
        self._failures = 0
        self._ejections = 0
        self._ejected_until = 0.0
        self._cooling_until = 0.0
        self._suspect_until = 0.0
        self._probing = False
        self._era = 0
        """Counts ejections: what began before one says nothing about the time after it."""
        self._longest = 0.0
        self._quiet_until = 0.0
        self.out: str | None = None
        """Why it takes no traffic until further notice, if it takes none."""
        self.readmitted_at = -math.inf
        """When it was last let in again."""
        self.unverified = False
        """Whether it is not known to be in its vector space, where others are."""
        self.silent: str | None = None
        """Why it is `unverified`, where it was asked for its vectors and gave none; operators are told until it
        does."""
        self.shown = self.compared = False
        """Whether it has shown its vectors, and whether these have been compared, since it was last away."""
        self.asked = 0.0
        """When it was asked last; 0 if it never was."""
        self.answered = False
        """Whether it ever has."""
        self.trouble: str | None = None
        """What an operator must see to, or why it was left out, since it last answered: code and message."""
        self._rest = ""
        """The same of its last long rest."""
        self._retired = False

    def show(self) -> None:
        """Whether it takes traffic, for the metrics."""
        if not self._retired:
            self._tell_metrics(self.out is None and not self.ejected and self.silent is None)

    def retire(self) -> None:
        """It gets no more calls; what those under way come to is told nowhere: its name may be another's by now."""
        self._retired = True

    @property
    def problem(self) -> str | None:
        """What is wrong with it now."""
        return self.trouble or self.silent or (self._rest if self._rest and self.cooldown_remaining() else None)

    @property
    def suspect(self) -> bool:
        """Whether it has only just failed: then others are asked first, so that few retries are needed."""
        return self._clock.monotonic() < self._suspect_until

    @property
    def ejected(self) -> bool:
        """Whether it has left the rotation for its failures, and nothing has succeeded since."""
        return self._ejections > 0

    @property
    def needs_comparison(self) -> bool:
        """Whether it has to be compared before it takes traffic that others can take: it may have come back as another
        model."""
        return self.unverified or self.ejected or self.out is not None

    def available(self) -> bool:
        """Whether it may have a call now; after an ejection, one call at a time."""
        if self.ejected and (self._probing or self._clock.monotonic() < self._ejected_until):
            return False
        return not self.cooldown_remaining()

    def take_out(self, reason: str) -> None:
        """Out of the rotation, even as the last: what it would answer is worse than no answer."""
        self.out = reason
        self.show()

    def stay_out(self, before: Health) -> None:
        """Out for the same reason as the one in whose place it comes, and looked at as that one would be."""
        self.out, self.asked = before.out, before.asked

    def let_in(self) -> None:
        """Its vectors are right. After its first ejection it may then have a call at once, for the others may be at
        their limit by now. Later ejections run their time: some servers answer a short text alone."""
        if self._ejections == 1:
            self._ejected_until = 0.0
        if self.out is not None:
            self.out, self.readmitted_at = None, self._clock.monotonic()
            self.show()

    def mark_verified(self) -> None:
        """Its vectors have been compared, which counts only if it was not away since it showed them."""
        self.unverified, self.silent, self.compared = False, None, self.shown
        self.show()

    def mark_unverified(self, reason: str) -> None:
        """It was to show its vectors and did not: others are asked in its place."""
        self.unverified, self.silent = True, reason
        self.show()

    def cooldown_remaining(self) -> float:
        """Seconds until a rate limit has passed; 0 when there is none."""
        return max(0.0, self._cooling_until - self._clock.monotonic())

    def rest_remaining(self) -> float:
        """Seconds until a rate limit, or else an ejection, has passed; 0 when there is none. The limit comes first, for
        one that is ejected may have a call all the same where all are."""
        now = self._clock.monotonic()
        return max(0.0, (self._cooling_until if self._cooling_until > now else self._ejected_until) - now)

    def begin(self) -> int:
        """A call goes there. Returns what `end` is to be told: in which era it began."""
        self._probing = self.ejected
        self.asked = self._clock.monotonic()
        return self._era

    def record_duration(self, seconds: float) -> None:
        """How long an answer took."""
        self._longest = max(seconds, self._longest * FADES)

    def had_ample_time(self, seconds: float) -> bool:
        """Whether a call that got no answer in so many seconds speaks against it. After an ejection each does."""
        return self.ejected or seconds >= self.ample_time

    @property
    def ample_time(self) -> float:
        """Seconds in which a call should have been answered, by how long answers have taken."""
        return min(2 * self._longest, TIME_ENOUGH)

    def drop(self, era: int) -> None:
        """A call that began in this era got no answer, and may have had too little time for one. Others are asked first
        for a moment; and each such call lowers what counts as too little, or one that hangs would never be found."""
        if era == self._era:
            self._ask_others_first(SUSPECT)
            self._longest *= DOUBTED

    def doubt(self, why: str, era: int) -> None:
        """What a call that began in this era brought is good in part only: others are asked first for a while."""
        if era == self._era:
            self._ask_others_first(DOUBTFUL)
            self._note_trouble(why)

    def abandon(self, era: int, *, others_first: bool = False) -> None:
        """A call that began in this era says nothing of the deployment. If it was the one call after an ejection, the
        next one takes its place. `others_first`: for a moment, as those may have what it lacked."""
        if era == self._era:
            self._probing = False
            if others_first:
                self._ask_others_first(SUSPECT)

    def end(self, error: GatewayError | None, era: int) -> None:
        """What a call that began in this era came to. A refused input speaks for a deployment, not against it."""
        if era != self._era:
            return
        self._probing = False
        if error is None or isinstance(error, InvalidRequest):
            if self._ejections:
                self._log("%s answers again", self._name)
                self._ejections = 0
                self.show()
            self.trouble = None
            self._failures = 0
            self._suspect_until = self._ejected_until = 0.0
            self.answered = True
        elif isinstance(error, RateLimited):
            wait = COOLING if error.retry_after is None else min(error.retry_after, LONGEST_REST)
            self._cooling_until = max(self._cooling_until, self._clock.monotonic() + wait)
            if wait >= LONG_REST:
                self._rest = f"{error.code}: {error.message}; it has no call for {wait:g} s"
                self._warn(self._rest)
        else:
            problem = f"{error.code}: {error.message}"
            if error.needs_operator:
                self._note_trouble(problem)
            if isinstance(error, UpstreamUnreachable):
                self.shown = self.compared = False
            self._failures += 1
            self._ask_others_first(SUSPECT)
            # While it is ejected it is asked only where all are, and what is then found is nothing new.
            if self._failures >= FAILURES and self._clock.monotonic() >= self._ejected_until:
                self._eject(problem)

    def _ask_others_first(self, seconds: float) -> None:
        self._suspect_until = max(self._suspect_until, self._clock.monotonic() + seconds)

    def _note_trouble(self, trouble: str) -> None:
        """Shown until it answers, and a line in the log now and then."""
        if self.trouble is None:
            self._warn(trouble)
        self.trouble = trouble

    def _warn(self, what: str) -> None:
        if self._clock.monotonic() >= self._quiet_until:
            self._log("%s: %s", self._name, what)
            self._quiet_until = self._clock.monotonic() + QUIET

    def _eject(self, problem: str) -> None:
        self._era += 1
        self._ejections = min(self._ejections + 1, MOST_EJECTIONS)
        self._ejected_until = self._clock.monotonic() + EJECTION * self._ejections
        self.show()
        self.trouble = problem
        self._log(
            "%s is left out for %g s, after %d failures in a row; the last: %s",
            *(self._name, EJECTION * self._ejections, self._failures, problem),
        )

    def _log(self, message: str, *values: object) -> None:
        if not self._retired:
            log.warning(message, *values)
