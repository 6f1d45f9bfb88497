"""Writes to a slow tier behind the caller's back: a queue bounded in bytes and one task that empties it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable

from app.cache.counts import Counts
from app.types import Embedding, SlowStore

log = logging.getLogger(__name__)

_ENTRY = 512
"""Bytes an entry in the queue takes besides its vector, about."""
_BATCH = 256
"""Entries handed to the store at once."""


class Writer:
    """Keeps at most `max_size` bytes waiting for `store`; what does not fit is dropped and counted."""

    def __init__(self, store: SlowStore, counts: Counts, max_size: int) -> None:
        self._store = store
        self._counts = counts
        self._max_size = max_size
        self._queue: deque[tuple[bytes, Embedding]] = deque()
        self.waiting: dict[bytes, Embedding] = {}
        """What waits, by key, that being written included: the newest where there are several."""
        self._size = 0
        self._task: asyncio.Task[None] | None = None
        self._failing = False
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes waiting, those being written included."""
        return self._size

    def offer(self, entries: Iterable[tuple[bytes, Embedding]]) -> None:
        """Takes what fits. Must be called within the event loop."""
        dropped = 0
        for entry in entries:
            cost = entry[1].size + _ENTRY
            if self._closed or self._size + cost > self._max_size:
                dropped += 1
                continue
            self._size += cost
            self._queue.append(entry)
            self.waiting[entry[0]] = entry[1]
        if dropped:
            self._counts.set_dropped.inc(dropped)
        # No task waits for work: one begins with the first entry and ends with the last.
        if self._queue and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
                try:
                    await self._store.put(batch)
                    self._failing = False
                except Exception:
                    self._counts.set_error.inc(len(batch))
                    if not self._failing:
                        log.exception("cache tier %s raised while writing", self._store.name)
                    self._failing = True
                except asyncio.CancelledError:
                    self._counts.set_dropped.inc(len(batch))
                    raise
                finally:
                    for key, embedding in batch:
                        self._size -= embedding.size + _ENTRY
                        if self.waiting.get(key) is embedding:
                            del self.waiting[key]
        finally:
            self._task = None

    async def close(self, timeout: float) -> None:
        """Writes what waits for at most `timeout` seconds; drops the rest."""
        self._closed = True
        if self._task is not None:
            task = self._task
            await asyncio.wait([task], timeout=timeout)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if self._queue:
            self._counts.set_dropped.inc(len(self._queue))
            log.warning("cache tier %s: %d values not written at the end", self._store.name, len(self._queue))
            self._queue.clear()
            self.waiting.clear()
            self._size = 0
