"""Answers from the cache what it holds; only misses go on, in full batches, below."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from app import vectors
from app.cache import keys
from app.cache.tiers import Tiers
from app.types import Embedder, Embedding, EmbedRequest, EmbedResult, Source


class CacheRead:
    """Derives the inputs' cache keys and makes one look-up for them. `space` is the vector space's identity.

    `nested`: shorter vectors are the beginnings of full ones, so a full one found serves for them.
    """

    def __init__(self, inner: Embedder, cache: Tiers, space: str, *, nested: bool = False) -> None:
        self._inner = inner
        self._cache = cache
        self._space = space
        self._nested = nested

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        derived = keys.derive(self._space, request.params, request.inputs, request.caller.namespace)
        found: list[Embedding | None]
        if request.read_cache:
            found = await self._cache.get(derived, numbers=request.numbers)
            if self._nested and request.params.dimensions is not None and None in found:
                await self._shorten(request, found, request.params.dimensions)
        else:
            found = [None] * len(derived)
        missing = [i for i, embedding in enumerate(found) if embedding is None]
        if not missing:
            return EmbedResult([each for each in found if each is not None], [Source.CACHE] * len(found))
        if len(missing) == len(found):
            return await self._inner(replace(request, keys=derived))
        return await self._merge(request, derived, found, missing)

    async def _shorten(self, request: EmbedRequest, found: list[Embedding | None], dimensions: int) -> None:
        """Fills in what full vectors can serve."""
        missing = [i for i, embedding in enumerate(found) if embedding is None]
        params, inputs = replace(request.params, dimensions=None), [request.inputs[i] for i in missing]
        full = await self._cache.get(keys.derive(self._space, params, inputs, request.caller.namespace))
        for i, embedding in zip(missing, full, strict=True):
            # A beginning that is all zero has no direction, and one that is missing is somebody else's vector.
            with suppress(ValueError):
                found[i] = embedding and Embedding(vectors.shorten(embedding.vector, dimensions), embedding.tokens)

    async def _merge(
        self, request: EmbedRequest, derived: list[bytes], found: list[Embedding | None], missing: list[int]
    ) -> EmbedResult:
        """The hits, and between them what the misses became."""
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
