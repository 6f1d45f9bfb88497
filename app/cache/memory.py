"""The tier inside the process: an LRU cache of embeddings, bounded in bytes.

For embeddings that are requested as numbers repeatedly it also keeps their JSON text, whose formatting is most of the
cost of an answer. Never waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from msgspec import Struct

from app import vectors
from app.cache.counts import Counts
from app.clock import Clock
from app.metrics import Metrics
from app.types import Embedding

OVERHEAD = 448
"""Bytes an entry takes besides its vector: key, `Embedding`, expiry, node and slot of the ordered dict. On average
363 are requested from the allocator (CPython 3.11); the rest covers its rounding and the growth of the dict."""
TEXTS_AT_ONCE = 64
"""Texts formatted in one lookup, at most, so that it does not hold up the event loop."""


class _Entry(Struct, gc=False):
    embedding: Embedding
    expires: float
    size: int
    """Bytes, overhead and text included."""
    read_as_numbers: bool = False
    """Whether its numbers were requested since it was inserted."""


class MemoryStore:
    """Holds at most `max_size` bytes, each entry for `ttl` seconds. For one event loop; not thread-safe."""

    name = "memory"
    status = "up"

    def __init__(self, max_size: int, ttl: float, clock: Clock, metrics: Metrics) -> None:
        self._max_size = max_size
        self._ttl = ttl
        self._now = clock.monotonic
        self._counts = Counts(metrics, self.name)
        self._bytes = metrics.cache_bytes.labels(self.name)
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._size = 0
        self._text_size = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes held, overhead included."""
        return self._size

    def lookup(self, keys: Sequence[bytes], *, numbers: bool = False) -> list[Embedding | None]:
        """One answer per key, in key order. `numbers`: the caller wants numbers, not base64."""
        entries = self._entries
        find, touch = entries.get, entries.move_to_end
        now = self._now()
        found: list[Embedding | None] = []
        add = found.append
        hits = expired = 0
        textless: list[_Entry] = []
        for key in keys:
            entry = find(key)
            if entry is None:
                add(None)
            elif entry.expires > now:
                hits += 1
                touch(key)
                add(entry.embedding)
                if numbers and entry.embedding.text is None:
                    textless.append(entry)
            else:
                self._drop(key)
                expired += 1
                add(None)
        if hits < len(found):
            self._counts.miss.inc(len(found) - hits)
        if expired:
            self._bytes.set(self._size)
        if hits:
            self._counts.hit.inc(hits)
        if textless:
            self._keep_texts(textless)
        return found

    def peek(self, key: bytes) -> Embedding | None:
        """Looks up one entry without counting it or marking it as recently used."""
        entry = self._entries.get(key)
        return entry.embedding if entry is not None and entry.expires > self._now() else None

    def _keep_texts(self, entries: Iterable[_Entry]) -> None:
        """Formats the texts of entries whose numbers are requested for the second time. Texts may take half of
        `max_size` in total: a text is three times as large as its vector, and a vector saves more."""
        formatted = 0
        for entry in entries:
            if not entry.read_as_numbers:
                entry.read_as_numbers = True
            elif entry.embedding.text is None and formatted < TEXTS_AT_ONCE and self._text_size < self._max_size // 2:
                text = entry.embedding.text = vectors.to_json(entry.embedding.vector)
                entry.size += len(text)
                self._text_size += len(text)
                self._size += len(text)
                formatted += 1
        self._shrink()
        self._bytes.set(self._size)

    def insert(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """Adds or replaces entries. Drops any that is larger than the whole store."""
        expires = self._now() + self._ttl
        held, max_size = self._entries, self._max_size
        dropped = added = 0
        for key, embedding in entries:
            if key in held:
                self._drop(key)
            text = embedding.text
            size = OVERHEAD + embedding.size + len(text or b"")
            if size > max_size:
                dropped += 1
                continue
            held[key] = _Entry(embedding, expires, size)
            added += size
            if text is not None:
                self._text_size += len(text)
        self._size += added
        self._shrink()
        if dropped < len(entries):
            self._counts.ok.inc(len(entries) - dropped)
        if dropped:
            self._counts.set_dropped.inc(dropped)
        self._bytes.set(self._size)

    def _shrink(self) -> None:
        while self._size > self._max_size:
            self._forget(self._entries.popitem(last=False)[1])

    def _drop(self, key: bytes) -> None:
        self._forget(self._entries.pop(key))

    def _forget(self, entry: _Entry) -> None:
        self._size -= entry.size
        if entry.embedding.text is not None:
            self._text_size -= len(entry.embedding.text)

    async def close(self) -> None:
        self._entries.clear()
        self._size = self._text_size = 0
        self._bytes.set(0)
