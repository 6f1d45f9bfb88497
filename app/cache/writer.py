"""Writes to a slow tier in the background: a queue bounded in bytes, and one task that drains it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from app.cache.counts import Counts
from app.cache.store import SlowStore
from app.clock import Clock
from app.logs import Seldom
from app.types import Embedding

log = logging.getLogger(__name__)

_OVERHEAD = 512
"""Bytes a queued entry takes besides its vector, approximately."""
_BATCH = 256
"""Entries passed to the store at once."""
_MAX_BARE_KEYS = 2**17
"""Keys that may be queued without their embeddings, at 170 bytes each."""
_TRIES = 6
"""Attempts at what the store does not answer: some until its breaker opens, and as many once it is back."""
_RETRY = 1.0
"""Seconds between checks whether a store that is away takes writes again; its breaker may allow a try less often."""


class Writer:
    """Queues at most `max_size` bytes for `store`. If an entry does not fit but `peek` finds it in memory, its bare key
    is queued, and the embedding looked up when its turn comes. If memory no longer has it then, or it was never there,
    the entry is dropped and counted. While the store is away, all of it waits."""

    def __init__(
        self,
        store: SlowStore,
        counts: Counts,
        max_size: int,
        peek: Callable[[bytes], Embedding | None],
        clock: Clock,
    ) -> None:
        self._store, self._clock = store, clock
        self._counts = counts
        self._max_size, self._peek = max_size, peek
        self._queue: deque[tuple[bytes, Embedding | None]] = deque()
        self._bare_keys = 0
        """Queued keys without an embedding."""
        self.waiting: dict[bytes, Embedding | None] = {}
        """The newest embedding of each key that is queued or being written; None if it is to be looked up in memory."""
        self.on_drop: Callable[[Sequence[bytes]], None] = lambda _: None
        """Called with the keys of what is not written after all, a turn of the event loop later: by then a call that
        brought it has ended."""
        self._size = 0
        self._task: asyncio.Task[None] | None = None
        self._given_up = 0
        """Values given up since a line about them was logged."""
        self._seldom = Seldom(clock.monotonic)
        self._away = False
        """Whether the task waits for the store to come back."""
        self._closed = False

    @property
    def size(self) -> int:
        """Bytes that are queued or being written."""
        return self._size

    def offer(self, entries: Iterable[tuple[bytes, Embedding]]) -> None:
        """Queues what fits. Must be called within the event loop."""
        dropped: list[bytes] = []
        for key, embedding in entries:
            cost = embedding.size + _OVERHEAD
            if self._closed:
                dropped.append(key)
            elif self._size + cost <= self._max_size:
                self._size += cost
                self._queue.append((key, embedding))
                self.waiting[key] = embedding
            elif self._bare_keys < _MAX_BARE_KEYS and self._peek(key) is not None:
                self._bare_keys += 1
                self._queue.append((key, None))
                self.waiting[key] = None
            else:
                dropped.append(key)
        if dropped:
            self._drop(dropped)
        # The task lives only while entries are queued: the first starts it, the last ends it.
        if self._queue and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            while self._queue:
                await self._wait_for_store()  # before anything is taken from the queue
                taken = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
                batch = self._complete(taken)
                left: Sequence[tuple[bytes, Embedding]] = batch
                try:
                    for _ in range(_TRIES):
                        if not left:
                            break
                        await self._wait_for_store()
                        left = await self._store.put(left)
                    if left:
                        self._give_up([key for key, _ in left])
                except Exception:
                    self._counts.set_error.inc(len(left))
                    if self._seldom("raised"):
                        log.exception("cache tier %s raised while writing", self._store.name)
                except asyncio.CancelledError:
                    self._queue.extendleft(left)
                    raise
                finally:
                    self._size -= sum(embedding.size + _OVERHEAD for _, embedding in taken if embedding is not None)
                    for key, embedding in batch:
                        if self.waiting.get(key) is embedding:
                            del self.waiting[key]
                # Bare keys that memory has evicted, perhaps 100,000 of them, never wait.
                await asyncio.sleep(0)
        finally:
            self._task = None

    def _drop(self, keys: Sequence[bytes]) -> None:
        self._counts.set_dropped.inc(len(keys))
        if not self._closed:
            asyncio.get_running_loop().call_soon(self.on_drop, keys)

    def _give_up(self, keys: Sequence[bytes]) -> None:
        self._drop(keys)
        self._given_up += len(keys)
        if self._seldom("given up"):
            log.warning("cache tier %s: %d values not written after %d tries", self._store.name, self._given_up, _TRIES)
            self._given_up = 0

    async def _wait_for_store(self) -> None:
        """Waits until the store takes writes."""
        while not await self._store.takes_writes():
            self._away = True
            await self._clock.sleep(_RETRY)
        self._away = False

    def _complete(self, taken: Iterable[tuple[bytes, Embedding | None]]) -> list[tuple[bytes, Embedding]]:
        """Looks up the embeddings of bare keys, dropping the keys that memory no longer has. Skips an embedding that is
        not its key's newest: the newest is written in its own turn, or was already, from memory. Embeddings found in
        memory are added to `waiting`, because memory may evict them during the write."""
        batch: list[tuple[bytes, Embedding]] = []
        dropped: list[bytes] = []
        for key, embedding in taken:
            if embedding is not None:
                if self.waiting.get(key) is embedding:
                    batch.append((key, embedding))
                continue
            self._bare_keys -= 1
            if key not in self.waiting or self.waiting[key] is not None:
                continue
            if (found := self._peek(key)) is None:
                dropped.append(key)
                del self.waiting[key]
            else:
                batch.append((key, found))
                self.waiting[key] = found
        if dropped:
            self._drop(dropped)
        return batch

    async def close(self, timeout: float) -> None:
        """Drains the queue for at most `timeout` seconds and drops the rest: at once if the store is away."""
        self._closed = True
        if self._task is not None:
            task = self._task
            if self._away and not await self._store.takes_writes():
                timeout = 0
            await asyncio.wait([task], timeout=timeout)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if self._queue:
            self._counts.set_dropped.inc(len(self._queue))
            log.warning("cache tier %s: %d values not written at the end", self._store.name, len(self._queue))
            self._queue.clear()
            self.waiting.clear()
            self._size = self._bare_keys = 0
