"""All tiers as one cache: asked from the fastest to the slowest, filled from the slowest to the fastest.

Knows no tier's insides. Never raises into a request and never lets a write hold one up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol
from weakref import WeakSet

from app.cache.counts import Counts
from app.cache.memory import MemoryStore
from app.cache.reader import Found, Reader
from app.cache.writer import Writer
from app.clock import Clock
from app.metrics import Metrics
from app.types import Embedding, LookupResult, SharedStore, SlowStore, Store

log = logging.getLogger(__name__)


class UnderWay(Protocol):
    """What embeds for requests (a batcher), and knows the keys of embeddings that are yet to come."""

    @property
    def busy(self) -> bool: ...

    def in_flight(self, key: bytes) -> bool: ...


class Tiers:
    """`stores` in the order they are asked. `write_buffer`: bytes that may wait for each slow tier.

    A memory tier, if there is one, stands first and is used without waiting; every other one is asked for several
    requests at once, and written to by a task of its own, so that one that stalls does not hold up the next.
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
        """As `_readers`, but the shared tier's claims what is missing."""
        self._writers: list[Writer] = []
        self._shared: SharedStore | None = None
        peek = self._memory.peek if self._memory is not None else (lambda _: None)
        for place, store in enumerate(self._slow):
            counts, on_found = Counts(metrics, store.name), partial(self._found, place)
            reader = claimer = Reader(store, counts, on_found, clock.monotonic)
            if isinstance(store, SharedStore):
                self._shared = store
                claimer = self._claimer = Reader(
                    store, counts, on_found, clock.monotonic, release_claims=self.release_claims
                )
                self._expired = metrics.cache_operations.labels(store.name, "claim", "expired")
            self._readers.append(reader)
            self._claimers.append(claimer)
            self._writers.append(Writer(store, counts, write_buffer, peek))
        self._looked_for: dict[bytes, int] = {}
        """Keys that slower tiers are asked for, and by how many look-ups."""
        self._came: dict[bytes, Embedding] = {}
        """What has come for these meanwhile: by the time a look-up ends that found nothing, it may have been written
        and be gone from here."""
        self._kept = (self._came, *(writer.waiting for writer in reversed(self._writers)))
        """By key, what memory may have no room for. One tier may have refused what waits for another that is slow."""
        self._letting_go: set[asyncio.Task[None]] = set()
        self.embedders: WeakSet[UnderWay] = WeakSet()
        """Everything that embeds over this cache, also for earlier configurations."""

    async def open(self) -> None:
        """Lets the tiers get ready, at once; one that cannot is down, which `status` says."""
        await asyncio.gather(*(store.open() for store in self._slow))

    @property
    def persistent(self) -> bool:
        """Whether what is kept here outlives this process."""
        return bool(self._slow)

    @property
    def shared(self) -> bool:
        """Whether replicas tell each other what they are embedding."""
        return self._shared is not None

    async def get(self, keys: Sequence[bytes], *, numbers: bool = False) -> list[Embedding | None]:
        """One answer per key, in their order; keys may repeat. When memory has all, nothing is waited for.

        `numbers`: the caller wants numbers, whose text memory keeps where it is asked for again and again.
        """
        return (await self._get(keys, numbers, self._readers))[0]

    async def get_or_claim(self, keys: Sequence[bytes], *, numbers: bool = False) -> LookupResult:
        """As `get`. What is missing and held by no other replica is then the caller's to embed, or to let go."""
        return await self._get(keys, numbers, self._claimers)

    async def look_again(self, keys: Sequence[bytes]) -> Found:
        """As `get_or_claim`, for keys that another replica held."""
        brought = self._brought(keys)
        with self._looking(keys):
            embeddings, held = await self._claimer.get(keys)
            embeddings = {**brought, **embeddings, **self._brought([key for key in keys if key not in embeddings])}
        self._expired.inc(sum(key not in embeddings and key not in held for key in keys))
        return Found(embeddings, held)

    def release_claims(self, keys: Sequence[bytes]) -> None:
        """Ends the claims on keys for which nothing will come, so that another replica that waits may embed them. Keeps
        the claim on what is under way here for another request. Waits for nothing."""
        if self._shared is None:
            return
        busy = [each for each in self.embedders if each.busy]
        if ended := [key for key in keys if not any(each.in_flight(key) for each in busy)]:
            task = asyncio.get_running_loop().create_task(self._shared.release_claims(ended))
            self._letting_go.add(task)
            task.add_done_callback(self._letting_go.discard)

    async def _get(self, keys: Sequence[bytes], numbers: bool, readers: Sequence[Reader]) -> LookupResult:
        memory = self._memory
        found: list[Embedding | None] = [None] * len(keys) if memory is None else memory.lookup(keys, numbers=numbers)
        if all(found):  # an embedding is always true; `None in` would compare each
            return found, ()
        held: Collection[bytes] = ()
        if not readers:
            return found, held
        missing = list(dict.fromkeys(key for key, value in zip(keys, found, strict=True) if value is None))
        fetched = self._brought(missing)
        missing = [key for key in missing if key not in fetched]
        with self._looking(missing):
            for reader in readers:
                if not missing:
                    break
                embeddings, held = await reader.get(missing)
                fetched.update(embeddings)
                missing = [key for key in missing if key not in fetched]
            fetched.update(self._brought(missing))
        missing = [key for key in missing if key not in fetched]
        if fetched:
            found = [fetched.get(key) if value is None else value for key, value in zip(keys, found, strict=True)]
        return found, held and {key for key in missing if key in held}  # and not those of others who asked with us

    def _brought(self, keys: Sequence[bytes]) -> dict[bytes, Embedding]:
        """What has come from a call of this replica that slower tiers may not know of yet."""
        places: list[Callable[[bytes], Embedding | None]] = [each.get for each in self._kept if each]  # most are empty
        if self._memory is not None:
            places.append(self._memory.peek)
        brought: dict[bytes, Embedding] = {}
        for find in places:
            brought.update((key, found) for key in keys if key not in brought and (found := find(key)) is not None)
        return brought

    @contextmanager
    def _looking(self, keys: Sequence[bytes]) -> Iterator[None]:
        """Keeps what comes for these keys, each given once, while slower tiers are asked for them."""
        looked_for = self._looked_for
        for key in keys:
            looked_for[key] = looked_for.get(key, 0) + 1
        try:
            yield
        finally:
            for key in keys:
                others = looked_for.pop(key) - 1
                if others:
                    looked_for[key] = others
                else:
                    self._came.pop(key, None)

    def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """Keeps these: in memory at once, elsewhere soon. Must be called within the event loop."""
        if self._looked_for:
            self._came.update(entry for entry in entries if entry[0] in self._looked_for)
        self._put_above(len(self._writers), entries)

    async def close(self, timeout: float = 5.0) -> None:
        """Writes what waits, for at most `timeout` seconds, then closes every tier."""
        await asyncio.gather(*(reader.close() for reader in {*self._readers, *self._claimers}), *self._letting_go)
        await asyncio.gather(*(writer.close(timeout) for writer in self._writers))
        for store in self._stores:
            try:
                await store.close()
            except Exception:
                log.exception("cache tier %s raised while closing", store.name)

    def status(self) -> dict[str, str]:
        """Per tier "up", or what is wrong with it."""
        return {store.name: store.status for store in self._stores}

    def _found(self, place: int, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """A tier has these, and the tiers above it had not. What has come into memory since is newer, and is in all
        tiers or soon will be."""
        if self._memory is not None:
            entries = [entry for entry in entries if self._memory.peek(entry[0]) is None]
        self._put_above(place, entries)

    def _put_above(self, place: int, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """Into the tiers above this place among the slow ones."""
        if self._memory is not None:
            self._memory.insert(entries)
        for writer in self._writers[:place]:
            writer.offer(entries)
