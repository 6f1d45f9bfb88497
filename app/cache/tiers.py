"""All tiers as one cache: read from the fastest to the slowest, filled from the slowest to the fastest.

Knows no tier's internals. Never raises into a request, and never delays one by a write.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol
from weakref import WeakSet

from app.cache.counts import Counts
from app.cache.memory import MemoryStore
from app.cache.reader import Found, Reader
from app.cache.store import CLAIM_TTL, LookupResult, SharedStore, SlowStore, Store
from app.cache.writer import Writer
from app.clock import Clock
from app.metrics import Metrics
from app.tasks import Tasks
from app.types import Embedding

log = logging.getLogger(__name__)

_RENEWAL_INTERVAL = CLAIM_TTL / 3
"""Seconds between two renewals of this replica's claims: one may be lost."""


class InFlight(Protocol):
    """Something that embeds for requests (a batcher) and knows the keys of the embeddings in flight."""

    @property
    def busy(self) -> bool: ...

    def in_flight(self, key: bytes) -> bool: ...


class Tiers:
    """`stores` in lookup order. `write_buffer`: bytes that may wait to be written to each slow tier.

    A memory tier, if any, comes first and is used without waiting. Every other tier is read for several requests at
    once and written by a task of its own, so that a stalled tier does not hold up the next.
    """

    def __init__(
        self, stores: Sequence[Store], metrics: Metrics, clock: Clock, *, write_buffer: int = 64 * 2**20
    ) -> None:
        self._memory = stores[0] if stores and isinstance(stores[0], MemoryStore) else None
        self._slow = tuple(store for store in stores if isinstance(store, SlowStore))
        self._stores = tuple(stores)
        if len(self._slow) + (self._memory is not None) < len(stores):
            raise TypeError("a tier is memory, which stands first, or a SlowStore: any other would never be asked")
        self._readers: list[Reader] = []
        self._claimers: list[Reader] = []
        """As `_readers`, except that the shared tier's reader claims the missing keys."""
        self._writers: list[Writer] = []
        self._shared: SharedStore | None = None
        peek = self._memory.peek if self._memory is not None else (lambda _: None)
        for index, store in enumerate(self._slow):
            counts, on_found = Counts(metrics, store.name), partial(self._on_found, index)
            reader = claimer = Reader(store, counts, on_found, clock.monotonic)
            if isinstance(store, SharedStore):
                self._shared = store
                claimer = self._claimer = Reader(
                    store, counts, on_found, clock.monotonic, release_claims=self.release_claims
                )
                self._expired = metrics.cache_operations.labels(store.name, "claim", "expired")
            self._readers.append(reader)
            self._claimers.append(claimer)
            self._writers.append(Writer(store, counts, write_buffer, peek, clock))
            if isinstance(store, SharedStore):
                self._unwritten = self._writers[-1].waiting
                self._writers[-1].on_drop = self.release_claims
        self._lookups: dict[bytes, int] = {}
        """The keys being looked up in slow tiers, each with its number of lookups."""
        self._undecided: set[bytes] = set()
        """Those of them whose claims will be released unless the caller embeds them."""
        self._arrived: dict[bytes, Embedding] = {}
        """Embeddings of these keys that were put meanwhile. By the time a lookup ends without finding them they may
        have been written and have left memory and the write queues."""
        self._recent: tuple[Mapping[bytes, Embedding | None], ...] = (
            self._arrived,
            *(writer.waiting for writer in reversed(self._writers)),
        )
        """By key, embeddings that memory may have no room for. One tier may have refused what waits for a slow one."""
        self._renewing: asyncio.Task[None] | None = None
        self._releasing = Tasks()
        self.embedders: WeakSet[InFlight] = WeakSet()
        """Everything that embeds over this cache, including for earlier configurations."""

    async def open(self) -> None:
        """Opens the tiers concurrently. One that fails is down, which `status` reports."""
        await asyncio.gather(*(store.open() for store in self._slow))

    @property
    def persistent(self) -> bool:
        """Whether entries outlive this process."""
        return bool(self._slow)

    @property
    def shared(self) -> bool:
        """Whether replicas share claims on the inputs they are embedding."""
        return self._shared is not None

    async def get(self, keys: Sequence[bytes], *, numbers: bool = False) -> list[Embedding | None]:
        """One answer per key, in key order; keys may repeat. Does not wait if memory has them all.

        `numbers`: the caller wants numbers, whose text memory keeps if they are requested repeatedly.
        """
        return (await self._get(keys, numbers, self._readers))[0]

    async def get_or_claim(self, keys: Sequence[bytes], *, numbers: bool = False) -> LookupResult:
        """As `get`. The caller must embed the missing keys that no other replica holds, or release them. Until then the
        claims on them are renewed."""
        if self._shared is not None and self._renewing is None:
            self._renewing = asyncio.get_running_loop().create_task(self._renew_claims(self._shared))
        return await self._get(keys, numbers, self._claimers)

    async def look_again(self, keys: Sequence[bytes]) -> Found:
        """As `get_or_claim`, for keys that another replica held."""
        recent = self._find_recent(keys)
        with self._looking_up(keys):
            embeddings, held = await self._claimer.get(keys)
            embeddings = {**recent, **embeddings, **self._find_recent([key for key in keys if key not in embeddings])}
        self._expired.inc(sum(key not in embeddings and key not in held for key in keys))
        return Found(embeddings, held)

    async def _renew_claims(self, store: SharedStore) -> None:
        """Renews them while anything is being embedded here. They lapse when this process dies or is suspended."""
        while True:
            await asyncio.sleep(_RENEWAL_INTERVAL)
            if any(each.busy for each in self.embedders):
                await store.renew_claims()

    def release_claims(self, keys: Sequence[bytes]) -> None:
        """Ends the claims on keys for which no embedding will come, so that a waiting replica may embed them. Keeps the
        claim on a key in flight here for another request, and on one whose embedding waits to be written: the write
        ends it. A key that is being looked up is decided on after that, as its caller may embed it. Does not wait."""
        if self._shared is None:
            return
        self._undecided.update(key for key in keys if key in self._lookups)
        busy = [embedder for embedder in self.embedders if embedder.busy]

        def wanted(key: bytes) -> bool:
            return key in self._unwritten or key in self._lookups or any(each.in_flight(key) for each in busy)

        if ended := [key for key in keys if not wanted(key)]:
            self._releasing.start(self._shared.release_claims(ended))

    async def _get(self, keys: Sequence[bytes], numbers: bool, readers: Sequence[Reader]) -> LookupResult:
        memory = self._memory
        found: list[Embedding | None] = [None] * len(keys) if memory is None else memory.lookup(keys, numbers=numbers)
        if all(found):  # every embedding is truthy; `None in found` would compare each
            return found, ()
        held: Collection[bytes] = ()
        if not readers:
            return found, held
        missing = list(dict.fromkeys(key for key, value in zip(keys, found, strict=True) if value is None))
        fetched = self._find_recent(missing)
        missing = [key for key in missing if key not in fetched]
        with self._looking_up(missing):
            for reader in readers:
                if not missing:
                    break
                embeddings, held = await reader.get(missing)
                fetched.update(embeddings)
                missing = [key for key in missing if key not in fetched]
            fetched.update(self._find_recent(missing))
        missing = [key for key in missing if key not in fetched]
        if fetched:
            found = [fetched.get(key) if value is None else value for key, value in zip(keys, found, strict=True)]
        return found, held and {key for key in missing if key in held}  # the lookup may have included others' keys

    def _find_recent(self, keys: Sequence[bytes]) -> dict[bytes, Embedding]:
        """Embeddings from calls of this replica, which slow tiers may not have yet."""
        finders: list[Callable[[bytes], Embedding | None]] = [some.get for some in self._recent if some]  # most empty
        if self._memory is not None:
            finders.append(self._memory.peek)
        collected: dict[bytes, Embedding] = {}
        for find in finders:
            collected.update((key, found) for key in keys if key not in collected and (found := find(key)) is not None)
        return collected

    @contextmanager
    def _looking_up(self, keys: Sequence[bytes]) -> Iterator[None]:
        """Keeps the embeddings that are put for these distinct keys while slow tiers are asked for them."""
        lookups = self._lookups
        for key in keys:
            lookups[key] = lookups.get(key, 0) + 1
        try:
            yield
        finally:
            for key in keys:
                others = lookups.pop(key) - 1
                if others:
                    lookups[key] = others
                else:
                    self._arrived.pop(key, None)
            if self._undecided and (decided := [key for key in keys if key in self._undecided and key not in lookups]):
                self._undecided.difference_update(decided)
                asyncio.get_running_loop().call_soon(self.release_claims, decided)  # once its caller has gone on

    def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """Stores entries: in memory now, in other tiers soon. Must be called within the event loop."""
        if self._lookups:
            self._arrived.update(entry for entry in entries if entry[0] in self._lookups)
        self._put_above(len(self._writers), entries)

    async def close(self, timeout: float = 5.0) -> None:
        """Flushes the write queues for at most `timeout` seconds, then closes every tier."""
        if self._renewing is not None:
            self._renewing.cancel()
        await asyncio.gather(*(reader.close() for reader in {*self._readers, *self._claimers}), *self._releasing)
        await asyncio.gather(*(writer.close(timeout) for writer in self._writers))
        for store in self._stores:
            try:
                await store.close()
            except Exception:
                log.exception("cache tier %s raised while closing", store.name)

    def status(self) -> dict[str, str]:
        """By tier: "up", or what is wrong with it."""
        return {store.name: store.status for store in self._stores}

    def _on_found(self, index: int, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """Copies entries found in slow tier `index` to the tiers above it. A key that entered memory since has a newer
        embedding, which is in all tiers or soon will be."""
        if self._memory is not None:
            entries = [entry for entry in entries if self._memory.peek(entry[0]) is None]
        self._put_above(index, entries)

    def _put_above(self, index: int, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """Stores entries in memory and in the slow tiers above `index`."""
        if self._memory is not None:
            self._memory.insert(entries)
        for writer in self._writers[:index]:
            writer.offer(entries)
