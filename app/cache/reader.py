"""Look-ups in a slow tier: those that come together, or while it is busy, become one, which asks for each key once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from app.cache.coalescer import Coalescer
from app.cache.counts import Counts
from app.types import Embedding, SharedStore, SlowStore

log = logging.getLogger(__name__)

_TOGETHER = 64
"""Keys that a shared look-up has, at most: all its requests wait for their vectors, 256 KiB if of 1,024 numbers
each."""
_LOG_EVERY = 60.0
"""Seconds between two reports of a tier that raises although it must not."""


class Found(NamedTuple):
    """What a look-up brought. `held`: keys that another replica is embedding. What is in neither is missing."""

    embeddings: Mapping[bytes, Embedding]
    held: Collection[bytes] = ()


_NONE = Found({})


class Reader:
    """`on_found` is told once what a look-up has found. `now` gives a monotonic clock's seconds. With `release_claims`
    the reader claims what is missing in a shared tier; `release_claims` gets the keys claimed for a caller who has
    hung up since."""

    def __init__(
        self,
        store: SlowStore,
        counts: Counts,
        on_found: Callable[[list[tuple[bytes, Embedding]]], None],
        now: Callable[[], float],
        *,
        release_claims: Callable[[list[bytes]], None] | None = None,
    ) -> None:
        self._store, self._counts, self._on_found, self._now = store, counts, on_found, now
        self._shared = store if release_claims and isinstance(store, SharedStore) else None
        self._let_go = release_claims
        self._together: Coalescer[Sequence[bytes], Found] = Coalescer(
            self._answer, _NONE, _TOGETHER, store.at_once, store.time_limit, self._late, len, self._gone
        )
        self._logged = -_LOG_EVERY

    async def get(self, keys: Sequence[bytes]) -> Found:
        """What there is of these, perhaps among what others have asked for. Never raises."""
        return await self._together.ask(keys)

    async def close(self) -> None:
        """Gives up what is under way: misses."""
        await self._together.close()

    async def _answer(self, asked: list[Sequence[bytes]]) -> list[Found]:
        return [await self._look_up(list(dict.fromkeys(chain.from_iterable(asked))))] * len(asked)

    def _late(self, asked: list[Sequence[bytes]]) -> None:
        self._counts.get_skipped.inc(sum(map(len, asked)))

    def _gone(self, keys: Sequence[bytes], found: Found, others: list[Sequence[bytes]]) -> None:
        if self._let_go is not None:
            wanted = set(chain(found.embeddings, found.held, *others))
            if claimed := [key for key in keys if key not in wanted]:
                self._let_go(claimed)

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
            now = self._now()
            if now - self._logged >= _LOG_EVERY:
                self._logged = now
                log.exception("cache tier %s raised while reading", self._store.name)
            return _NONE
        if hits:
            self._on_found(hits)
        return Found(dict(hits), held)
