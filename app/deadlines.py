"""Timeouts on blocks of code that run with every request or call. `asyncio.timeout` would start and stop a timer each
time, at 6 µs; here one timer serves them all.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from msgspec import Struct

_GRACE_PERIODS, _GRACE_PERIOD = 4, 0.002
"""How many times, and by how many seconds each, a block that is due is put off: its answer may have arrived, unread,
while the event loop was late."""
_PAUSE, _READING_TIME = 0.1, 2.0
"""A timer that fires this many seconds late shows that the process was paused. What a peer could not send meanwhile,
because nobody read it, takes up to this many seconds to arrive."""


class Deadlines:
    """The running deadlines of one owner, on one event loop. `extend_after_pause` gives the blocks that a pause of the
    process has made late some seconds to end by themselves."""

    def __init__(self, *, extend_after_pause: bool = False) -> None:
        self._extend_after_pause = extend_after_pause
        self._running: dict[Deadline, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        """When the timer fires, on the event loop's clock."""
        self.cpu_time = 0.0
        """Seconds of CPU time this thread had used when the timer was set. Reading it per block would cost 2 µs."""

    def timeout(self, seconds: float) -> Deadline:
        """A limit on the seconds a block may take, from now. An answer that has arrived by then is still read."""
        return Deadline(asyncio.get_running_loop().time() + seconds, self)

    def io_timeout(self, seconds: float) -> Deadline:
        """A limit on the seconds a block may wait for work done elsewhere, from now. CPU time of this thread, as it may
        spend on other requests, does not count."""
        now = asyncio.get_running_loop().time()
        return IoDeadline(now + seconds, self, _started=now, _seconds=seconds)

    def add(self, deadline: Deadline) -> None:
        self._running[deadline] = None
        if self._timer is None or deadline.when < self._due:
            self._set_timer(deadline.when)

    def discard(self, deadline: Deadline) -> None:
        self._running.pop(deadline, None)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due, self.cpu_time = when, time.thread_time()
        self._timer = asyncio.get_running_loop().call_at(when, self._fire)

    def _fire(self) -> None:
        """Ends the blocks that are due: often none, for a block that ends in time does not stop the timer."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        if self._extend_after_pause and now - self._due > _PAUSE:
            for each in self._running:
                each.extend_to(now + _READING_TIME)
        for deadline in [each for each in self._running if each.when <= now]:
            if extension := deadline.extension():
                deadline.when = now + extension
            else:
                self.discard(deadline)
                deadline.stop(TimeoutError)
        if self._running:
            self._set_timer(min(each.when for each in self._running))


class Deadline(Struct, eq=False):
    """Cancels the block at `when`, on the event loop's clock; the block then raises `TimeoutError`. To be entered once,
    within a task."""

    when: float
    _deadlines: Deadlines
    _task: Any = None
    """The task that entered it."""
    _exception: type[Exception] | None = None
    _grace_periods: int = _GRACE_PERIODS

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._deadlines.add(self)

    def extension(self) -> float:
        """Seconds by which to put it off, now that it is due; 0 to end it."""
        # If this thread was not working but waiting for the CPU, the answer may be here, unread.
        self._grace_periods -= 1
        return _GRACE_PERIOD if self._grace_periods >= 0 else 0.0

    def extend_to(self, when: float) -> None:
        """Puts it off until `when`: a few times at most, for an event loop may always be late."""
        if self.when < when and self._grace_periods > 0:
            self._grace_periods -= 1
            self.when = when

    def stop(self, exception: type[Exception]) -> None:
        """Cancels the block, which then raises `exception`. Only the first call counts."""
        if self._exception is None:
            self._exception = exception
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._deadlines.discard(self)
        if self._exception is None or self._task.uncancel():
            return
        # Whether or not the block had just finished, the cancellation was only ours, and ends here.
        if kind is None or issubclass(kind, asyncio.CancelledError):
            raise self._exception


class IoDeadline(Deadline):
    """A limit on waiting for work done elsewhere: see `Deadlines.io_timeout`."""

    _started: float = 0.0
    _seconds: float = 0.0
    _cpu_time: float = 0.0

    def __enter__(self) -> None:
        Deadline.__enter__(self)
        # Read when the timer was set, up to one timeout ago: work done since then only lengthens this block's time.
        self._cpu_time = self._deadlines.cpu_time

    def extension(self) -> float:
        waited = asyncio.get_running_loop().time() - self._started - (time.thread_time() - self._cpu_time)
        if waited < self._seconds:
            return max(self._seconds - max(waited, 0.0), _GRACE_PERIOD)
        return Deadline.extension(self)
