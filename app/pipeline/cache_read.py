"""Answers from the cache; only misses go on, to be batched below."""

from __future__ import annotations

from collections.abc import Collection

from msgspec.structs import replace

from app.cache import keys
from app.cache.tiers import Tiers
from app.errors import UpstreamInvalidResponse
from app.pipeline.parts import merge_result, mixed_lengths, sub_request
from app.types import NO_EMBEDDING, Embedder, Embedding, EmbedRequest, EmbedResult, Source


class CacheRead:
    """Derives the inputs' cache keys and looks them all up at once. `space` is the vector space's name.

    A cached full-length vector is never truncated to a shorter length that the upstream makes itself, even if the
    vendor says that one is its prefix: the last bits would depend on what happened to be cached.
    """

    def __init__(self, inner: Embedder, cache: Tiers, space: str, native: int | None = None) -> None:
        """`native`: the model's default vector length, if known."""
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
        sparse_only = request.params.output_type == "sparse"
        expected = 0 if sparse_only else request.params.dimensions or self._native
        if expected is not None and any(found):
            found = _drop_other_lengths(found, 4 * expected)
        if all(found):  # an embedding is always truthy
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
            return await self._embed_again(replace(request, keys=derived), result.calls)
        return result

    async def _embed_again(self, request: EmbedRequest, calls: int) -> EmbedResult:
        """Embeds the whole request again. The model behind the name has changed, for good or for a moment, and the
        cache has vectors of both. Asked for all at once, they are of one model again, and replace those in the cache.
        Raises `UpstreamInvalidResponse`.

        `calls`: those made so far.
        """
        result = await self._inner(request)
        result.calls += calls
        if mixed_lengths(result.embeddings):
            error = UpstreamInvalidResponse("the upstream gives vectors of different lengths for one model")
            error.calls = result.calls
            error.no_client_retry = True  # a client's retry would pay for everything again
            raise error
        return result


def _drop_other_lengths(found: list[Embedding | None], length: int) -> list[Embedding | None]:
    """Drops vectors of other lengths in bytes; no gateway wrote these, because the contract refuses them."""
    if {len(each.vector) for each in found if each} == {length}:  # nearly always
        return found
    return [each if each is None or len(each.vector) == length else None for each in found]
