"""Look-ups in a slow tier: those of one turn of the event loop are one, and a key is asked for once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from app.cache.counts import Counts
from app.types import Embedding, Store

log = logging.getLogger(__name__)

_TOGETHER = 64
"""Keys up to which requests share a look-up: vectors of 1,024 numbers are 256 KiB then, for which all of them wait."""
_LOG_EVERY = 60.0
"""Seconds between two reports of a tier that raises although it must not."""

Found = Mapping[bytes, Embedding]


class _LookUp:
    """Keys, each once, and who waits to hear which of them were found."""

    __slots__ = ("keys", "waiting")

    def __init__(self) -> None:
        self.keys: dict[bytes, None] = {}
        self.waiting: list[asyncio.Future[Found]] = []


class Reader:
    """Asks `store` in tasks of its own: a caller who hangs up takes nobody's answer along.

    `on_found` is told what a look-up has found, once. `now` gives a monotonic clock's seconds.
    """

    def __init__(
        self,
        store: Store,
        counts: Counts,
        on_found: Callable[[list[tuple[bytes, Embedding]]], None],
        now: Callable[[], float],
    ) -> None:
        self._store, self._counts, self._on_found, self._now = store, counts, on_found, now
        self._next: _LookUp | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._logged = -_LOG_EVERY

    async def get(self, keys: Sequence[bytes]) -> Found:
        """What there is of these, perhaps among what others have asked for. Never raises."""
        look_up = self._next
        if look_up is None or len(look_up.keys) + len(keys) > _TOGETHER:
            look_up = self._next = _LookUp()
            task = asyncio.get_running_loop().create_task(self._answer(look_up))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        look_up.keys.update(dict.fromkeys(keys))
        future: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        look_up.waiting.append(future)
        return await future

    async def close(self) -> None:
        """Gives up what is under way: misses."""
        await asyncio.sleep(0)  # a task that is cancelled before it has begun would tell nobody
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, look_up: _LookUp) -> None:
        if self._next is look_up:
            self._next = None
        found: Found = {}
        try:
            found = await self._ask(list(look_up.keys))
        finally:
            # Whatever happened: nobody may be left waiting.
            for future in look_up.waiting:
                if not future.done():
                    future.set_result(found)

    async def _ask(self, keys: list[bytes]) -> Found:
        try:
            answers = await self._store.get(keys)
            hits = [(key, answer) for key, answer in zip(keys, answers, strict=True) if answer is not None]
        except Exception:
            self._counts.get_error.inc(len(keys))
            now = self._now()
            if now - self._logged >= _LOG_EVERY:
                self._logged = now
                log.exception("cache tier %s raised while reading", self._store.name)
            return {}
        if hits:
            self._on_found(hits)
        return dict(hits)
