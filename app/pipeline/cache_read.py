"""Answers from the cache what it holds; only misses go on, in full batches, below."""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from app.cache import keys
from app.cache.tiers import Tiers
from app.errors import UpstreamInvalidResponse
from app.pipeline.parts import merge_result, mixed_lengths, sub_request
from app.types import NO_EMBEDDING, Embedder, Embedding, EmbedRequest, EmbedResult, Source


class CacheRead:
    """Derives the inputs' cache keys and makes one look-up for them. `space` is the vector space's identity.

    A full vector found is not cut for a shorter one that the upstream gives itself, even where the vendor says
    it is its beginning: the last bits would depend on what happened to be cached.
    """

    def __init__(self, inner: Embedder, cache: Tiers, space: str, native: int | None = None) -> None:
        """`native`: the length of vectors that the model is known to give unasked, if it is."""
        self._inner = inner
        self._cache = cache
        self._space = space
        self._native = native

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        derived = keys.derive(self._space, request.params, request.inputs, request.caller.namespace)
        found: list[Embedding | None] = [None] * len(derived)
        held: Collection[bytes] = ()
        if request.shareable:
            found, held = await self._cache.get_or_claim(derived, numbers=request.numbers)
        elif request.read_cache:
            found = await self._cache.get(derived, numbers=request.numbers)
        wanted = request.params.dimensions or self._native
        if wanted is not None and any(found):
            found = _of_length(found, 4 * wanted)
        if all(found):  # an embedding is always true
            result = EmbedResult(found, [Source.CACHE] * len(found))  # type: ignore[arg-type]
        elif not any(found):
            result = await self._inner(replace(request, keys=derived, held=held))
        else:
            result = EmbedResult([each or NO_EMBEDDING for each in found], [Source.CACHE] * len(found))
            missing = [i for i, embedding in enumerate(found) if embedding is None]
            merge_result(
                result, missing, await self._inner(sub_request(replace(request, keys=derived, held=held), missing))
            )
        if len(derived) > 1 and mixed_lengths(result.embeddings):
            return await self._anew(replace(request, keys=derived), result.calls)
        return result

    async def _anew(self, request: EmbedRequest, calls: int) -> EmbedResult:
        """The model behind the name has become another one, or was one for a moment, and what is cached is of either.
        Asked all at once it is of one again, and takes the place of what was cached. Raises `UpstreamInvalidResponse`.

        `calls`: those made so far."""
        result = await self._inner(request)
        result.calls += calls
        if mixed_lengths(result.embeddings):
            error = UpstreamInvalidResponse("the upstream gives vectors of different lengths for one model")
            error.calls = result.calls
            raise error
        return result


def _of_length(found: list[Embedding | None], length: int) -> list[Embedding | None]:
    """Without vectors of other lengths in bytes, which nobody here has written: the contract refuses them. A sparse
    one stands alone."""
    if {len(each.vector) for each in found if each} <= {length, 0}:  # nearly always
        return found
    return [each if each is None or len(each.vector) in (length, 0) else None for each in found]
