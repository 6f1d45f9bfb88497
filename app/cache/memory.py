"""The tier inside the process: the embeddings themselves, least recently used out first, bounded in bytes.

Knows no wire format and never waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from app.cache.counts import Counts
from app.clock import Clock
from app.metrics import Metrics
from app.types import Embedding

OVERHEAD = 448
"""Bytes an entry takes besides its vector: key, `Embedding`, expiry, node and slot of the ordered dict. 363 asked
of the allocator on CPython 3.11 on average; the rest is for its rounding and the dict's growth."""


class MemoryStore:
    """Holds at most `max_size` bytes for `ttl` seconds each. For one event loop; not for threads."""

    name = "memory"
    status = "up"

    def __init__(self, max_size: int, ttl: float, clock: Clock, metrics: Metrics) -> None:
        self._max_size = max_size
        self._ttl = ttl
        self._now = clock.monotonic
        self._counts = Counts(metrics, self.name)
        self._entries: OrderedDict[bytes, tuple[Embedding, float]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes held, overhead included."""
        return self._size

    def lookup(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        """As `get`, without waiting."""
        entries = self._entries
        find, touch = entries.get, entries.move_to_end
        now = self._now()
        found: list[Embedding | None] = []
        add = found.append
        misses = 0
        for key in keys:
            entry = find(key)
            if entry is not None and entry[1] > now:
                touch(key)
                add(entry[0])
            else:
                if entry is not None:
                    self._drop(key)
                misses += 1
                add(None)
        if misses:
            self._counts.miss.inc(misses)
            self._counts.bytes.set(self._size)
        if misses < len(found):
            self._counts.hit.inc(len(found) - misses)
        return found

    def insert(self, entries: Iterable[tuple[bytes, Embedding]]) -> None:
        """As `put`, without waiting. What alone is larger than the whole store is not kept."""
        expires = self._now() + self._ttl
        kept = dropped = 0
        for key, embedding in entries:
            if key in self._entries:
                self._drop(key)
            cost = len(embedding.vector) + OVERHEAD
            if cost > self._max_size:
                dropped += 1
                continue
            self._entries[key] = (embedding, expires)
            self._size += cost
            kept += 1
            while self._size > self._max_size:
                self._drop(next(iter(self._entries)))
        if kept:
            self._counts.ok.inc(kept)
        if dropped:
            self._counts.set_dropped.inc(dropped)
        self._counts.bytes.set(self._size)

    def _drop(self, key: bytes) -> None:
        embedding, _ = self._entries.pop(key)
        self._size -= len(embedding.vector) + OVERHEAD

    async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        return self.lookup(keys)

    async def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        self.insert(entries)

    async def close(self) -> None:
        self._entries.clear()
        self._size = 0
        self._counts.bytes.set(0)
