"""Where several replicas miss the same texts at once, one embeds and pays for them, and the others wait for that."""

from __future__ import annotations

import asyncio

from app.cache.tiers import Tiers
from app.pipeline.parts import merge_result, sub_request
from app.types import CLAIM_TTL, NO_EMBEDDING, Embedder, EmbedRequest, EmbedResult, Source

_LOOK = 0.02
"""Seconds between two looks for what another embeds."""


class Claim:
    """Embeds what no other replica has claimed, and then what others have not brought: they failed, died, or took
    longer than a claim lasts. Waiting for others ends with half of the request's time, so as to leave some for that."""

    def __init__(self, inner: Embedder, cache: Tiers) -> None:
        self._inner, self._cache = inner, cache

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        if not request.held:
            return await self._embed(request)
        keys, count, now = request.keys, len(request.keys), asyncio.get_running_loop().time()
        until = now + min(CLAIM_TTL, (request.deadline - now) / 2)
        whole = EmbedResult([NO_EMBEDDING] * count, [Source.CACHE] * count)
        ours = [i for i in range(count) if keys[i] not in request.held]
        theirs = [i for i in range(count) if keys[i] in request.held]
        while True:
            if ours:
                merge_result(whole, ours, await self._embed(sub_request(request, ours)))
            if not theirs:
                return whole
            if not ours:
                # All requests that wait look in the same turn of the event loop, and so in one look-up.
                await asyncio.sleep(_LOOK - asyncio.get_running_loop().time() % _LOOK)
            late = asyncio.get_running_loop().time() >= until
            found, held = await self._cache.look_again(list(dict.fromkeys(keys[i] for i in theirs)))
            for i in theirs:
                whole.embeddings[i] = found.get(keys[i], NO_EMBEDDING)
            ours = [i for i in theirs if keys[i] not in found and (late or keys[i] not in held)]
            theirs = [i for i in theirs if keys[i] in held and not late]

    async def _embed(self, request: EmbedRequest) -> EmbedResult:
        try:
            result = await self._inner(request)
        except Exception:
            # Not of inputs under way, which `release_claims` sees to: their calls go on, and what they bring is cached.
            if request.shareable:
                self._cache.release_claims(request.keys)
            raise
        # A caller that hangs up lets go of nothing here, for the same reason: of what is dropped from the queue, or
        # fails when nobody waits for it any more, the batcher tells (`on_drop`).
        if request.shareable and result.too_long:
            self._cache.release_claims([request.keys[i] for i in result.too_long])
        return result
