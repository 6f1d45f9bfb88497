"""Lookups in a slow tier. Concurrent ones, and those that arrive while it is busy, become one that asks for each key
once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from app.cache.coalescer import Coalescer
from app.cache.counts import Counts
from app.cache.store import SharedStore, SlowStore
from app.logs import Seldom
from app.types import Embedding

log = logging.getLogger(__name__)

_MAX_KEYS = 64
"""Keys in a shared lookup, at most: every request in it waits for all their vectors, 256 KiB at 1,024 dimensions."""


class Found(NamedTuple):
    """The result of a lookup. `held`: keys that another replica is embedding. A key in neither is missing."""

    embeddings: Mapping[bytes, Embedding]
    held: Collection[bytes] = ()


_NOTHING_FOUND = Found({})


class Reader:
    """`on_found` gets the hits of each lookup, once. `now` returns the seconds of a monotonic clock. With
    `release_claims` the reader claims the keys missing from a shared tier; `release_claims` gets those claimed for a
    caller who has since hung up."""

    def __init__(
        self,
        store: SlowStore,
        counts: Counts,
        on_found: Callable[[list[tuple[bytes, Embedding]]], None],
        now: Callable[[], float],
        *,
        release_claims: Callable[[list[bytes]], None] | None = None,
    ) -> None:
        self._store, self._counts, self._on_found = store, counts, on_found
        self._shared = store if release_claims and isinstance(store, SharedStore) else None
        self._release_claims = release_claims
        self._coalescer: Coalescer[Sequence[bytes], Found] = Coalescer(
            self._answer, _NOTHING_FOUND, _MAX_KEYS, store.at_once, store.time_limit, self._late, len, self._on_hang_up
        )
        self._seldom = Seldom(now)

    async def get(self, keys: Sequence[bytes]) -> Found:
        """The embeddings found, which may include keys that other callers asked for. Never raises."""
        return await self._coalescer.ask(keys)

    async def close(self) -> None:
        """Cancels the lookups in flight; their keys count as missing."""
        await self._coalescer.close()

    async def _answer(self, lookups: list[Sequence[bytes]]) -> list[Found]:
        return [await self._look_up(list(dict.fromkeys(chain.from_iterable(lookups))))] * len(lookups)

    def _late(self, lookups: list[Sequence[bytes]]) -> None:
        self._counts.get_skipped.inc(sum(map(len, lookups)))

    def _on_hang_up(self, keys: Sequence[bytes], found: Found, others: list[Sequence[bytes]]) -> None:
        if self._release_claims is not None:
            wanted = set(chain(found.embeddings, found.held, *others))
            if claimed := [key for key in keys if key not in wanted]:
                self._release_claims(claimed)

    async def _look_up(self, keys: list[bytes]) -> Found:
        held: Collection[bytes] = ()
        try:
            if self._shared is None:
                answers = await self._store.get(keys)
            else:
                answers, held = await self._shared.get_or_claim(keys)
            hits = [(key, answer) for key, answer in zip(keys, answers, strict=True) if answer is not None]
        except Exception:
            self._counts.get_error.inc(len(keys))
            if self._seldom():
                log.exception("cache tier %s raised while reading", self._store.name)
            return _NOTHING_FOUND
        if hits:
            self._on_found(hits)
        return Found(dict(hits), held)
