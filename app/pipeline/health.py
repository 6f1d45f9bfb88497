"""Whether a deployment takes traffic, judged by its regular calls."""

from __future__ import annotations

import random
from collections.abc import Callable

from app.clock import Clock
from app.errors import GatewayError, InvalidRequest, RateLimited, UpstreamUnreachable
from app.pipeline.standing import Standing
from app.pipeline.trouble import Trouble

FAILURES = 5
"""Consecutive failures after which a deployment leaves the rotation."""
SUSPECT = 1.0
"""Seconds after a failure during which other deployments go first."""
DOUBTFUL = 10.0
"""The same after a reply that lacked what another deployment returns: it may do so every time, and retries are few."""
EJECTION = 30.0
"""Seconds out of the rotation; twice, three times … as long if it then fails again at once."""
MOST_EJECTIONS = 10
"""The largest multiple of `EJECTION`."""
COOLDOWN = 1.0
"""Seconds of rest after a rate limit that does not say how long: twice as many each time the next call is refused too,
and a random part of up to half as many, because replicas that were refused together would ask again together."""
LONGEST_COOLDOWN = 8.0
"""Seconds of such a rest, at most, without its random part."""
LONGEST_REST = 300.0
"""Seconds of rest, at most. An upstream may send a date where a number of seconds belongs."""
DECAY = 0.98
"""What each further call leaves of the longest call's time. It fades slowly: short calls between long ones say little
about the long ones."""
TIMEOUT_DECAY = 0.8
"""What a call that timed out leaves of it."""
MAX_AMPLE_TIME = 30.0
"""Seconds in which a call should be answered, however long calls have taken."""


class Health:
    """One deployment's health: in rotation, ejected, or cooling down after a rate limit.

    An ejected deployment comes back by a single call: it succeeds, or the ejection starts again and lasts longer.
    """

    def __init__(
        self,
        clock: Clock,
        report: Callable[[bool], None],
        name: str,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`report` is called with whether it takes traffic; `name` is the deployment's, for the log; `jitter` returns
        random numbers from 0 to 1."""
        self._clock, self._jitter = clock, jitter
        self.trouble = Trouble(clock, report, name)
        self.standing = Standing(clock, self.show, self.trouble.note_length_change)
        self._failures = 0
        self._ejections = 0
        self._ejected_until = 0.0
        self._cooling_until = 0.0
        self._cooldown = COOLDOWN
        """The next rest after a rate limit that does not say how long, without its random part."""
        self._suspect_until = 0.0
        self._probing = False
        self._era = 0
        """Counts ejections: a call that began before one says nothing about the time after it."""
        self._longest_call = 0.0
        self.asked = 0.0
        """When it was last called; 0 if it never was."""
        self.answered = False
        """Whether it has ever answered."""

    def show(self) -> None:
        """Shows operators whether it takes traffic."""
        self.trouble.show(self.standing.serves and not self.ejected)

    @property
    def problem(self) -> str | None:
        """What is wrong with it now, for operators."""
        resting = self.trouble.rest if self.cooldown_remaining() else ""
        return self.trouble.lasting or self.standing.silent or resting or self.trouble.length_change

    @property
    def suspect(self) -> bool:
        """Whether it has only just failed: others then go first, so that few retries are needed."""
        return self._clock.monotonic() < self._suspect_until

    @property
    def ejected(self) -> bool:
        """Whether it has left the rotation for its failures, and nothing has succeeded since."""
        return self._ejections > 0

    @property
    def needs_comparison(self) -> bool:
        """Whether it must be compared before it takes traffic that others can take: it may have come back as another
        model."""
        return self.standing.unverified or self.ejected or self.standing.out is not None

    def available(self) -> bool:
        """Whether it may take a call now; after an ejection, one call at a time."""
        if self.ejected and (self._probing or self._clock.monotonic() < self._ejected_until):
            return False
        return not self.cooldown_remaining()

    def inherit(self, before: Health) -> None:
        """Takes over what its predecessor knew: whether callers know its vectors, which are then right in doubt; and
        why it was out, if it was, so that it stays out and is checked when that one would have been."""
        self.answered = before.answered
        self.standing.inherit(before.standing)
        if before.standing.out is not None:
            self.asked = before.asked

    def let_in(self) -> None:
        """Its vectors are right. After its first ejection it may take a call at once, for the others may be at their
        limit by now. Later ejections run their time: some servers still answer a short text, and nothing else."""
        if self._ejections == 1:
            self._ejected_until = 0.0
        self.standing.let_in()

    def cooldown_remaining(self) -> float:
        """Seconds until a rate limit has passed; 0 when there is none."""
        return max(0.0, self._cooling_until - self._clock.monotonic())

    def rest_remaining(self) -> float:
        """Seconds until a rate limit, or else an ejection, has passed; 0 when there is none. The limit comes first: an
        ejected deployment may still get a call when all are ejected."""
        now = self._clock.monotonic()
        return max(0.0, (self._cooling_until if self._cooling_until > now else self._ejected_until) - now)

    def begin(self) -> int:
        """A call starts. Returns the era it starts in, to be passed to `end`."""
        self._probing = self.ejected
        self.asked = self._clock.monotonic()
        return self._era

    def record_duration(self, seconds: float) -> None:
        """Records how long an answer took."""
        self._longest_call = max(seconds, self._longest_call * DECAY)

    def had_ample_time(self, seconds: float) -> bool:
        """Whether a call that got no answer in this time counts against it. After an ejection every one does."""
        return self.ejected or seconds >= self.ample_time

    @property
    def ample_time(self) -> float:
        """Seconds in which a call should be answered, by how long answers have taken."""
        return min(2 * self._longest_call, MAX_AMPLE_TIME)

    def drop(self, era: int) -> None:
        """A call that began in this era got no answer, and may have had too little time for one. Others go first for a
        moment. Each such call lowers what counts as too little, or one that hangs would never be found."""
        if era == self._era:
            self._prefer_others(SUSPECT)
            self._longest_call *= TIMEOUT_DECAY

    def doubt(self, why: str, era: int) -> None:
        """A call that began in this era returned results good only in part: others go first for a while."""
        if era == self._era:
            self._prefer_others(DOUBTFUL)
            self.trouble.note("incomplete", why)

    def abandon(self, era: int, *, others_first: bool = False) -> None:
        """A call that began in this era says nothing about the deployment. If it was the one call after an ejection,
        the next one takes its place. `others_first`: for a moment, since they may have what it lacked."""
        if era == self._era:
            self._probing = False
            if others_first:
                self._prefer_others(SUSPECT)

    def end(self, error: GatewayError | None, era: int) -> None:
        """Records how a call that began in this era ended. A refused input speaks for a deployment, not against it."""
        if era != self._era:
            return
        self._probing = False
        if error is None or isinstance(error, InvalidRequest):
            self.trouble.answered(after_ejection=self.ejected)
            if self.ejected:
                self._ejections = 0
                self.show()
            self._failures, self._cooldown = 0, COOLDOWN
            self._suspect_until = self._ejected_until = 0.0
            self.answered = True
        elif isinstance(error, RateLimited):
            self._cool_down(error)
        else:
            problem = f"{error.code}: {error.message}"
            if error.needs_operator:
                self.trouble.note(error.code, problem)
            else:
                self.trouble.warn(error.code, problem)
            if isinstance(error, UpstreamUnreachable):
                self.standing.mark_away()
            self._failures += 1
            self._prefer_others(SUSPECT)
            # While it is ejected it is called only if all are; a failure is then nothing new.
            if self._failures >= FAILURES and self._clock.monotonic() >= self._ejected_until:
                self._eject(problem)

    def _cool_down(self, error: RateLimited) -> None:
        now = self._clock.monotonic()
        if error.retry_after is not None:
            wait = min(error.retry_after, LONGEST_REST)
        elif self.asked < self._cooling_until:
            return  # begun before the rest, and refused like the call beside it
        else:
            wait = self._cooldown * (1 + self._jitter() / 2)
            self._cooldown = min(2 * self._cooldown, LONGEST_COOLDOWN)
        self._cooling_until = max(self._cooling_until, now + wait)
        self.trouble.note_rest(error, wait)

    def _prefer_others(self, seconds: float) -> None:
        self._suspect_until = max(self._suspect_until, self._clock.monotonic() + seconds)

    def _eject(self, problem: str) -> None:
        self._era += 1
        self._ejections = min(self._ejections + 1, MOST_EJECTIONS)
        self._ejected_until = self._clock.monotonic() + EJECTION * self._ejections
        self.show()
        self.trouble.note_ejection(problem, EJECTION * self._ejections, self._failures)
