"""Time limits on blocks of code, for what is done with every request or call: `asyncio.timeout` would start and stop a
timer each time, at 6 µs, and here one timer looks after all of them.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from msgspec import Struct

_MOMENTS, _MOMENT = 4, 0.002
"""How many times, and for how many seconds, a block that is due goes on: its answer may have come, and not been read
yet, while the event loop was late."""


class Deadlines:
    """The running ones of one owner, on one event loop."""

    def __init__(self) -> None:
        self._running: dict[Deadline, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        """When the timer will look, on the event loop's clock."""
        self.cpu_time = 0.0
        """Seconds of processor time this thread had used when the timer was set. To ask for each block costs 2 µs."""

    def timeout(self, seconds: float) -> Deadline:
        """A block that ends in so many seconds from now."""
        return Deadline(asyncio.get_running_loop().time() + seconds, self)

    def io_timeout(self, seconds: float) -> Deadline:
        """A block that ends when it has waited so many seconds for what is done elsewhere. Time in which this thread
        was itself at work, as it may be for other requests, does not count."""
        now = asyncio.get_running_loop().time()
        return Waiting(now + seconds, self, _began=now, _seconds=seconds)

    def add(self, deadline: Deadline) -> None:
        self._running[deadline] = None
        if self._timer is None or deadline.when < self._due:
            self._look_at(deadline.when)

    def discard(self, deadline: Deadline) -> None:
        self._running.pop(deadline, None)

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due, self.cpu_time = when, time.thread_time()
        self._timer = asyncio.get_running_loop().call_at(when, self._look)

    def _look(self) -> None:
        """Ends what is due. A block that ends in time does not stop the timer, so often nothing is."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        for deadline in [each for each in self._running if each.when <= now]:
            if extension := deadline.extension():
                deadline.when = now + extension
            else:
                self.discard(deadline)
                deadline.stop(TimeoutError)
        if self._running:
            self._look_at(min(each.when for each in self._running))


class Deadline(Struct, eq=False):
    """Cancels the block at `when`, on the event loop's clock; the block then raises `TimeoutError`. To be entered
    once, within a task."""

    when: float
    _deadlines: Deadlines
    _task: Any = None
    """That entered it."""
    _end: type[Exception] | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._deadlines.add(self)

    def extension(self) -> float:
        """Seconds by which it is put off, now that it is due; 0: it is not."""
        return 0.0

    def stop(self, end: type[Exception]) -> None:
        """Cancels the block, which then raises this; the first call of it counts."""
        if self._end is None:
            self._end = end
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._deadlines.discard(self)
        if self._end is None or self._task.uncancel():
            return
        # Whether the block had just finished or not, the cancellation was ours alone and ends here.
        if kind is None or issubclass(kind, asyncio.CancelledError):
            raise self._end


class Waiting(Deadline):
    """A limit on waiting for what is done elsewhere: see `Deadlines.io_timeout`."""

    _began: float = 0.0
    _seconds: float = 0.0
    _at_work: float = 0.0
    _moments: int = _MOMENTS

    def __enter__(self) -> None:
        Deadline.__enter__(self)
        # Read when the timer was set, up to a time limit ago: work done since then only adds to this block's time.
        self._at_work = self._deadlines.cpu_time

    def extension(self) -> float:
        waited = asyncio.get_running_loop().time() - self._began - (time.thread_time() - self._at_work)
        if waited < self._seconds:
            return max(self._seconds - max(waited, 0.0), _MOMENT)
        # Where this thread was not at work but had no turn on the machine, the answer may be here, unread.
        self._moments -= 1
        return _MOMENT if self._moments >= 0 else 0.0
