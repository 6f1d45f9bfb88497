"""What the cache asks of a tier: any, one whose lookups take time, and one that all replicas share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from app.types import Embedding

CLAIM_TTL = 3.0
"""Seconds after which claims lapse unless they are renewed, as their owner may have died; and for which a query waits
for another replica. Longer than most calls take, but less than httpx's default timeout of 5."""


class Store(Protocol):
    """One cache tier. Never raises into a request: a failure is a miss, logged and counted."""

    name: str

    @property
    def status(self) -> str:
        """ "up", or what is wrong with it."""
        ...

    async def close(self) -> None: ...


LookupResult: TypeAlias = tuple[list[Embedding | None], Collection[bytes]]
"""One answer per key, and the missing keys that another replica has claimed."""


@runtime_checkable
class SlowStore(Store, Protocol):
    """A tier whose lookups are awaited."""

    at_once: int
    """Maximum concurrent lookups of a few keys each."""

    def time_limit(self, keys: int, /) -> float:
        """Seconds that a lookup of this many keys may take."""
        ...

    async def open(self) -> None:
        """Prepares the tier before the first request, so that `status` is true from the start. Never fails."""
        ...

    async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        """Looks up all keys at once; the answer is as long as `keys`."""
        ...

    async def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> Sequence[tuple[bytes, Embedding]]:
        """Stores the entries, or drops those it refuses. Returns those that another try may store."""
        ...

    async def takes_writes(self) -> bool:
        """Whether a write would be tried now. Asks a tier that was away, now and then, whether it is back."""
        ...


@runtime_checkable
class SharedStore(SlowStore, Protocol):
    """A tier shared by all replicas, in which each claims what it is embedding. Never raises either."""

    async def get_or_claim(self, keys: Sequence[bytes]) -> LookupResult:
        """Like `get`; also claims the keys that are missing and unclaimed for this replica. Its claims last `CLAIM_TTL`
        seconds from the latest call of this or of `renew_claims`. A tier that cannot do that claims nothing."""
        ...

    async def renew_claims(self) -> None:
        """Renews all claims of this replica."""
        ...

    async def release_claims(self, keys: Sequence[bytes]) -> None:
        """Releases this replica's claims on keys that it will not embed."""
        ...
