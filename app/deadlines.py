"""What must not take longer than its time. For what is done with every request or call, where `asyncio.timeout` would
start and stop a timer each time, at 6 µs: here one timer looks after all of them.
"""

from __future__ import annotations

import asyncio


class Deadlines:
    """Those that are running, of one event loop."""

    def __init__(self) -> None:
        self._running: dict[Deadline, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        """When the timer will look, on the event loop's clock."""

    def within(self, seconds: float) -> Deadline:
        """A block that ends in so many seconds from now."""
        return Deadline(asyncio.get_running_loop().time() + seconds, self)

    def add(self, deadline: Deadline) -> None:
        self._running[deadline] = None
        if self._timer is None or deadline.when < self._due:
            self._look_at(deadline.when)

    def discard(self, deadline: Deadline) -> None:
        self._running.pop(deadline, None)

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = when
        self._timer = asyncio.get_running_loop().call_at(when, self._look)

    def _look(self) -> None:
        """Nobody tells the timer of what ends in time: when it comes, most that it was set for is long over."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        for deadline in [each for each in self._running if each.when <= now]:
            self.discard(deadline)
            deadline.stop(TimeoutError)
        if self._running:
            self._look_at(min(each.when for each in self._running))


class Deadline:
    """Cancels the block at `when`, on the event loop's clock; the block then raises `TimeoutError`. To be entered
    once, within a task."""

    __slots__ = ("_deadlines", "_end", "_task", "when")

    def __init__(self, when: float, deadlines: Deadlines) -> None:
        self.when, self._deadlines = when, deadlines
        self._end: type[Exception] | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._deadlines.add(self)

    def stop(self, end: type[Exception]) -> None:
        """Has the block raise this, unless something else has ended it."""
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
