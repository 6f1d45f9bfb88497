"""What ends a request before its time: its deadline, and a caller who hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any


class ClientGone(Exception):
    """The caller hung up; there is nobody to answer."""


class Guard:
    """Cancels the block at the deadline, which then raises `TimeoutError`; or, once `watch` was called, when the
    caller hangs up, which then raises `ClientGone`.

    The deadline is looked for from the next turn of the event loop on: an answer from memory does not pay for it.
    `deadline` is on the event loop's clock. To be entered within a task.
    """

    __slots__ = ("_deadline", "_end", "_handle", "_listeners", "_loop", "_task")

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._listeners: set[Callable[[], None]] | None = None
        self._end: type[Exception] | None = None

    def __enter__(self) -> Guard:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._handle: asyncio.Handle = self._loop.call_soon(self._arm)
        return self

    def watch(self, scope: MutableMapping[str, Any]) -> None:
        """From now on nothing more is to come from the caller, whose connection calls back when it is lost
        (`app.protocol`). Under a server that does not, callers who hang up are not noticed."""
        self._listeners = scope.get("extensions", {}).get("hang_up")
        if self._listeners is not None:
            self._listeners.add(self._gone)

    def _arm(self) -> None:
        self._handle = self._loop.call_at(self._deadline, self._stop, TimeoutError)

    def _gone(self) -> None:
        self._stop(ClientGone)

    def _stop(self, end: type[Exception]) -> None:
        if self._end is None:
            self._end = end
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handle.cancel()
        if self._listeners is not None:
            self._listeners.discard(self._gone)
        if self._end is None or self._task.uncancel():
            return
        # Whether the block had just finished or not, the cancellation was ours alone and ends here.
        if kind is None or issubclass(kind, asyncio.CancelledError):
            raise self._end
