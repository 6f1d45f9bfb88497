"""Answers from the cache what it holds; only misses go on, in full batches, below."""

from __future__ import annotations

from msgspec.structs import replace

from app.cache import keys
from app.cache.tiers import Tiers
from app.types import Embedder, Embedding, EmbedRequest, EmbedResult, Source


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
        found: list[Embedding | None]
        if request.read_cache:
            found = await self._cache.get(derived, numbers=request.numbers)
        else:
            found = [None] * len(derived)
        if all(found):  # an embedding is always true
            return EmbedResult(found, [Source.CACHE] * len(found))  # type: ignore[arg-type]
        if not any(found):
            return await self._inner(replace(request, keys=derived))
        return await self._merge(request, derived, found)

    async def _merge(self, request: EmbedRequest, derived: list[bytes], found: list[Embedding | None]) -> EmbedResult:
        """The hits, and between them what the misses became."""
        missing = [i for i, embedding in enumerate(found) if embedding is None]
        rest = replace(
            request,
            inputs=[request.inputs[i] for i in missing],
            keys=[derived[i] for i in missing],
            positions=missing if request.positions is None else [request.positions[i] for i in missing],
        )
        result = await self._inner(rest)
        sources = [Source.CACHE] * len(found)
        for i, embedding, source in zip(missing, result.embeddings, result.sources, strict=True):
            found[i] = embedding
            sources[i] = source
        result.embeddings = [each for each in found if each is not None]
        result.sources = sources
        result.too_long = {missing[i]: error for i, error in result.too_long.items()}
        return result
