"""When several replicas miss the same texts at once, one embeds and pays for them, and the others wait for it."""

from __future__ import annotations

import asyncio
import math

from app.cache.store import CLAIM_TTL
from app.cache.tiers import Tiers
from app.pipeline.parts import merge_result, sub_request
from app.types import NO_EMBEDDING, Embedder, EmbedRequest, EmbedResult, Source

_POLL_INTERVAL, _LONG_POLL_INTERVAL = 0.02, 0.25
"""Seconds between two lookups of what another replica is embedding: at first, and after `CLAIM_TTL`."""


class Claim:
    """Embeds what no other replica has claimed, and then what the others did not deliver: they failed, died, or took
    too long. A query waits for them for `CLAIM_TTL` seconds, because its text may be far back in another replica's
    queue. Bulk work, which is expensive to pay for twice, waits for as long as they hold their claims. Neither waits
    for more than half of the request's time, so that the rest is left to embed the inputs here."""

    def __init__(self, inner: Embedder, cache: Tiers) -> None:
        self._inner, self._cache = inner, cache

    async def __call__(self, request: EmbedRequest) -> EmbedResult:
        if not request.held:
            return await self._embed(request)
        keys, count, now = request.keys, len(request.keys), asyncio.get_running_loop().time()
        patience = CLAIM_TTL if request.lane == "query" else math.inf
        until = now + min(patience, (request.deadline - now) / 2)
        whole = EmbedResult([NO_EMBEDDING] * count, [Source.CACHE] * count)
        ours = [i for i in range(count) if keys[i] not in request.held]
        theirs = [i for i in range(count) if keys[i] in request.held]
        while True:
            if ours:
                merge_result(whole, ours, await self._embed(sub_request(request, ours)))
            if not theirs:
                return whole
            if not ours:
                # All waiting requests look in the same turn of the event loop, and so share one lookup.
                waited = asyncio.get_running_loop().time() - now
                interval = _POLL_INTERVAL if waited < CLAIM_TTL else _LONG_POLL_INTERVAL
                await asyncio.sleep(interval - asyncio.get_running_loop().time() % interval)
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
            # `release_claims` keeps those on inputs in flight: their calls go on, and their results are cached.
            if request.shareable:
                self._cache.release_claims(request.keys)
            raise
        # A caller that hangs up releases nothing here, for the same reason: the batcher reports (`on_drop`) what it
        # drops from the queue, and what fails when nobody waits for it any more, or had failed before that.
        if request.shareable and result.too_long:
            self._cache.release_claims([request.keys[i] for i in result.too_long])
        return result
