"""The tier inside the process: the embeddings themselves, least recently used out first, bounded in bytes.

Of embeddings that are asked for as numbers again and again it keeps the numbers' text too, which is most of what
answering costs. Never waits.
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
"""Bytes an entry takes besides its vector: key, `Embedding`, expiry, node and slot of the ordered dict. 363 asked
of the allocator on CPython 3.11 on average; the rest is for its rounding and the dict's growth."""
TEXTS_AT_ONCE = 64
"""Texts made in one look-up, at most: others wait for their turn on the event loop."""


class _Entry(Struct, gc=False):
    embedding: Embedding
    expires: float
    size: int
    """Bytes, overhead and text included."""
    asked: bool = False
    """Whether its numbers were asked for since it was inserted."""


class MemoryStore:
    """Holds at most `max_size` bytes for `ttl` seconds each. For one event loop; not for threads."""

    name = "memory"
    status = "up"

    def __init__(self, max_size: int, ttl: float, clock: Clock, metrics: Metrics) -> None:
        self._max_size = max_size
        self._ttl = ttl
        self._now = clock.monotonic
        self._counts = Counts(metrics, self.name)
        self._bytes = metrics.buffered_gauge(metrics.cache_bytes.labels(self.name))
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._size = 0
        self._texts = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes held, overhead included."""
        return self._size

    def lookup(self, keys: Sequence[bytes], *, numbers: bool = False) -> list[Embedding | None]:
        """One answer per key, in their order. `numbers`: the caller wants numbers, not base64."""
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
        """One entry, for a second look: it is neither counted nor makes the entry recently used."""
        entry = self._entries.get(key)
        return entry.embedding if entry is not None and entry.expires > self._now() else None

    def _keep_texts(self, entries: Iterable[_Entry]) -> None:
        """Makes the texts of entries whose numbers are asked for the second time. All texts together may take half the
        room: each takes three times what its vector does, and a vector saves more."""
        made = 0
        for entry in entries:
            if not entry.asked:
                entry.asked = True
            elif entry.embedding.text is None and made < TEXTS_AT_ONCE and self._texts < self._max_size // 2:
                text = entry.embedding.text = vectors.to_json(entry.embedding.vector)
                entry.size += len(text)
                self._texts += len(text)
                self._size += len(text)
                made += 1
        self._shrink()
        self._bytes.set(self._size)

    def insert(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """Keeps these. What alone is larger than the whole store is not kept."""
        expires = self._now() + self._ttl
        held, most = self._entries, self._max_size
        dropped = added = 0
        for key, embedding in entries:
            if key in held:
                self._drop(key)
            text = embedding.text
            size = OVERHEAD + embedding.size + len(text or b"")
            if size > most:
                dropped += 1
                continue
            held[key] = _Entry(embedding, expires, size)
            added += size
            if text is not None:
                self._texts += len(text)
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
            self._texts -= len(entry.embedding.text)

    async def close(self) -> None:
        self._entries.clear()
        self._size = self._texts = 0
        self._bytes.set(0)
