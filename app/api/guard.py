"""What ends a request before its time: its deadline, and a caller who hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any


class ClientGone(Exception):
    """The caller hung up; there is nobody to answer."""


class Deadlines:
    """Ends what takes longer than its time. One timer for all: they are given the same time, so that who came first is
    due first."""

    def __init__(self) -> None:
        self._guards: dict[Guard, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, guard: Guard) -> None:
        self._guards[guard] = None
        if self._timer is None:
            self._look_at(guard.deadline)

    def discard(self, guard: Guard) -> None:
        self._guards.pop(guard, None)

    def _look_at(self, deadline: float) -> None:
        self._timer = asyncio.get_running_loop().call_at(deadline, self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for guard in list(self._guards):
            if guard.deadline > now:
                self._look_at(guard.deadline)
                return
            self.discard(guard)
            guard.stop(TimeoutError)


class Guard:
    """Cancels the block at the deadline, which then raises `TimeoutError`; or, once `watch` was called, when the
    caller hangs up, which then raises `ClientGone`.

    `deadline` is on the event loop's clock. To be entered within a task.
    """

    __slots__ = ("_deadlines", "_end", "_listeners", "_task", "deadline")

    def __init__(self, deadline: float, deadlines: Deadlines) -> None:
        self.deadline, self._deadlines = deadline, deadlines
        self._listeners: set[Callable[[], None]] | None = None
        self._end: type[Exception] | None = None

    def __enter__(self) -> Guard:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._deadlines.add(self)
        return self

    def watch(self, scope: MutableMapping[str, Any]) -> None:
        """From now on nothing more is to come from the caller, whose connection calls back when it is lost
        (`app.protocol`). Under a server that does not, callers who hang up are not noticed."""
        self._listeners = scope.get("extensions", {}).get("hang_up")
        if self._listeners is not None:
            self._listeners.add(self._gone)

    def stop(self, end: type[Exception]) -> None:
        """Has the block end with this, unless something else has ended it."""
        if self._end is None:
            self._end = end
            self._task.cancel()

    def _gone(self) -> None:
        self.stop(ClientGone)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._deadlines.discard(self)
        if self._listeners is not None:
            self._listeners.discard(self._gone)
        if self._end is None or self._task.uncancel():
            return
        # Whether the block had just finished or not, the cancellation was ours alone and ends here.
        if kind is None or issubclass(kind, asyncio.CancelledError):
            raise self._end
