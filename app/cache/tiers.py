"""All tiers as one cache: asked from the fastest to the slowest, filled from the slowest to the fastest.

Knows no tier's insides. Never raises into a request and never lets a write hold one up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from app.cache.counts import Counts
from app.cache.memory import MemoryStore
from app.cache.reader import Reader
from app.cache.writer import Writer
from app.clock import Clock
from app.metrics import Metrics
from app.types import Embedding, Store

log = logging.getLogger(__name__)


class Tiers:
    """`stores` in the order they are asked. `write_buffer`: bytes that may wait for each slow tier.

    A memory tier, if there is one, stands first and is used without waiting; every other one is asked for all requests
    of a turn at once, and written to by a task of its own, so that one that stalls does not hold up the next.
    """

    def __init__(
        self, stores: Sequence[Store], metrics: Metrics, clock: Clock, *, write_buffer: int = 64 * 2**20
    ) -> None:
        self._memory = stores[0] if stores and isinstance(stores[0], MemoryStore) else None
        self._slow = tuple(stores if self._memory is None else stores[1:])
        self._stores = tuple(stores)
        self._readers: list[Reader] = []
        self._writers: list[Writer] = []
        for place, store in enumerate(self._slow):
            counts = Counts(metrics, store.name)
            self._readers.append(Reader(store, counts, partial(self._put_above, place), clock.monotonic))
            self._writers.append(Writer(store, counts, write_buffer))

    async def open(self) -> None:
        """Lets the tiers that can do so get ready, at once; one that cannot is down, which `status` says."""
        opened = [opener() for store in self._slow if (opener := getattr(store, "open", None))]
        await asyncio.gather(*opened)

    async def get(self, keys: Sequence[bytes], *, numbers: bool = False) -> list[Embedding | None]:
        """One answer per key, in their order; keys may repeat. When memory has all, nothing is waited for.

        `numbers`: the caller wants numbers, whose text memory keeps where it is asked for again and again.
        """
        found: list[Embedding | None]
        if self._memory is None:
            found = [None] * len(keys)
        else:
            found = self._memory.lookup(keys, numbers=numbers)
            if all(found):  # an embedding is always true; `None in` would compare each
                return found
        if not self._slow:
            return found
        missing = list(dict.fromkeys(key for key, value in zip(keys, found, strict=True) if value is None))
        fetched: dict[bytes, Embedding] = {}
        for reader in self._readers:
            fetched.update(await reader.get(missing))
            missing = [key for key in missing if key not in fetched]
            if not missing:
                break
        if not fetched:
            return found
        return [fetched.get(key) if value is None else value for key, value in zip(keys, found, strict=True)]

    def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """Keeps these: in memory at once, elsewhere soon. Must be called within the event loop."""
        self._put_above(len(self._writers), entries)

    async def close(self, timeout: float = 5.0) -> None:
        """Writes what waits, for at most `timeout` seconds, then closes every tier."""
        await asyncio.gather(*(reader.close() for reader in self._readers))
        await asyncio.gather(*(writer.close(timeout) for writer in self._writers))
        for store in self._stores:
            try:
                await store.close()
            except Exception:
                log.exception("cache tier %s raised while closing", store.name)

    def status(self) -> dict[str, str]:
        """Per tier "up", or what is wrong with it."""
        return {store.name: getattr(store, "status", "up") for store in self._stores}

    def _put_above(self, place: int, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """Into the tiers above this place among the slow ones."""
        if self._memory is not None:
            self._memory.insert(entries)
        for writer in self._writers[:place]:
            writer.offer(entries)
