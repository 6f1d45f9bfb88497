"""Caches the embeddings of every upstream call, so that after a sibling's failure a retry costs only that sibling."""

from __future__ import annotations

from app.cache.tiers import Tiers
from app.types import Batch, BatchEmbedder, BatchResult, Embedding


class CacheFill:
    """Hands every embedding of a completed call to the cache; does not wait for the write."""

    def __init__(self, inner: BatchEmbedder, cache: Tiers) -> None:
        self._inner = inner
        self._cache = cache

    async def __call__(self, batch: Batch) -> BatchResult:
        result = await self._inner(batch)
        if batch.store:
            pairs = zip(batch.keys, result.outcomes, strict=True)
            self._cache.put([pair for pair in pairs if type(pair[1]) is Embedding])  # type: ignore[misc]
        return result
