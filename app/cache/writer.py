"""Writes to a slow tier behind the caller's back: a queue bounded in bytes and one task that empties it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable

from app.cache.counts import Counts
from app.types import Embedding, SlowStore

log = logging.getLogger(__name__)

_ENTRY = 512
"""Bytes an entry in the queue takes besides its vector, about."""
_BATCH = 256
"""Entries handed to the store at once."""
_KEYS = 2**17
"""Keys that may wait without their embeddings: 130 bytes each."""


class Writer:
    """Keeps at most `max_size` bytes waiting for `store`. Of what does not fit, if `peek` finds it in memory, the key
    waits, to be looked up when its turn comes. What is found no more, and all else, is dropped and counted."""

    def __init__(
        self, store: SlowStore, counts: Counts, max_size: int, peek: Callable[[bytes], Embedding | None]
    ) -> None:
        self._store = store
        self._counts = counts
        self._max_size, self._peek = max_size, peek
        self._queue: deque[tuple[bytes, Embedding | None]] = deque()
        self._keys = 0
        """Those in the queue without an embedding."""
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
        for key, embedding in entries:
            cost = embedding.size + _ENTRY
            if self._closed:
                dropped += 1
            elif self._size + cost <= self._max_size:
                self._size += cost
                self._queue.append((key, embedding))
                self.waiting[key] = embedding
            elif self._keys < _KEYS and self._peek(key) is not None:
                self._keys += 1
                self._queue.append((key, None))
                self.waiting.pop(key, None)  # it is an older one
            else:
                dropped += 1
        if dropped:
            self._counts.set_dropped.inc(dropped)
        # No task waits for work: one begins with the first entry and ends with the last.
        if self._queue and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            while self._queue:
                taken = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
                batch = self._whole(taken)
                try:
                    if batch:
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
                    self._size -= sum(embedding.size + _ENTRY for _, embedding in taken if embedding is not None)
                    for key, embedding in batch:
                        if self.waiting.get(key) is embedding:
                            del self.waiting[key]
                # A store that is down waits for nothing, nor do keys of which memory has let go: a hundred thousand.
                await asyncio.sleep(0)
        finally:
            self._task = None

    def _whole(self, taken: Iterable[tuple[bytes, Embedding | None]]) -> list[tuple[bytes, Embedding]]:
        """These with their embeddings, each key's newest alone: another is written in its turn, or has been from
        memory, which may let go of one while it is written. Without those whose is found no more."""
        batch: list[tuple[bytes, Embedding]] = []
        for key, embedding in taken:
            if embedding is not None:
                if self.waiting.get(key) is embedding:
                    batch.append((key, embedding))
                continue
            self._keys -= 1
            if key in self.waiting:
                continue
            if (found := self._peek(key)) is None:
                self._counts.set_dropped.inc()
            else:
                batch.append((key, found))
                self.waiting[key] = found
        return batch

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
            self._size = self._keys = 0
