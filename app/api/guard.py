"""What ends a request before its time: its deadline, and a caller who hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGone(Exception):
    """The caller hung up; there is nobody to answer."""


class Guard:
    """Cancels the block at the deadline, which then raises `TimeoutError`; and, once `watch` was called, when the
    caller hangs up, which then raises `ClientGone`.

    Both are looked for from the next turn of the event loop on: an answer from memory pays for neither.
    `deadline` is on the event loop's clock. To be entered within a task.
    """

    __slots__ = ("_armed", "_deadline", "_end", "_handle", "_loop", "_receive", "_task", "_watcher")

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._receive: Receive | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._end: type[Exception] | None = None
        self._armed = False

    def __enter__(self) -> Guard:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._handle: asyncio.Handle = self._loop.call_soon(self._arm)
        return self

    def watch(self, receive: Receive) -> None:
        """From now on nothing more is to come from the caller: the body has been read."""
        self._receive = receive
        if self._armed:
            self._watch()

    def _arm(self) -> None:
        self._armed = True
        self._handle = self._loop.call_at(self._deadline, self._stop, TimeoutError)
        if self._receive is not None:
            self._watch()

    def _watch(self) -> None:
        self._watcher = self._loop.create_task(self._wait_for_hang_up())

    async def _wait_for_hang_up(self) -> None:
        assert self._receive is not None
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._stop(ClientGone)

    def _stop(self, end: type[Exception]) -> None:
        if self._end is None:
            self._end = end
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handle.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._end is None or self._task.uncancel():
            return
        # Whether the block had just finished or not, the cancellation was ours alone and ends here.
        if kind is None or issubclass(kind, asyncio.CancelledError):
            raise self._end
