"""Answers from the cache what it holds; only misses go on, in full batches, below."""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from app.cache import keys
from app.cache.tiers import Tiers
from app.pipeline.parts import part, put
from app.types import NOTHING, Embedder, Embedding, EmbedRequest, EmbedResult, Source


class CacheRead:
    """Derives the inputs' cache keys and makes one look-up for them. `space` is the vector space's identity.

    A full vector found is not cut for a shorter one that the upstream gives itself, even where the vendor says
    it is its beginning: the last bits would depend on what happened to be cached.
    """

    def __init__(self, inner: Embedder, cache: Tiers, space: str) -> None:
        self._inner = inner
        self._cache = cache
        self._space = space

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        derived = keys.derive(self._space, request.params, request.inputs, request.caller.namespace)
        found: list[Embedding | None] = [None] * len(derived)
        held: Collection[bytes] = ()
        if request.shares:
            found, held = await self._cache.get_or_claim(derived, numbers=request.numbers)
        elif request.read_cache:
            found = await self._cache.get(derived, numbers=request.numbers)
        if all(found):  # an embedding is always true
            return EmbedResult(found, [Source.CACHE] * len(found))  # type: ignore[arg-type]
        request = replace(request, keys=derived, held=held)
        if not any(found):
            return await self._inner(request)
        whole = EmbedResult([each or NOTHING for each in found], [Source.CACHE] * len(found))
        missing = [i for i, embedding in enumerate(found) if embedding is None]
        put(whole, missing, await self._inner(part(request, missing)))
        return whole
