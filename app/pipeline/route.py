"""Hands out slots on a model's deployments and sees a batch through. Retries live here and nowhere else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from app.errors import GatewayError, UpstreamTimeout
from app.metrics import Metrics
from app.pipeline.deployment import Deployment
from app.types import Batch, BatchResult, Embedding, Lane, Params
from app.upstreams.kind import Clock

ATTEMPTS = 2
BACKOFF = 0.2
"""Seconds; the upper end of the jitter before a second attempt."""


class Slot:
    """The right to make one call to `deployment`. Give it back once."""

    __slots__ = ("deployment",)

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment

    def give_back(self) -> None:
        self.deployment.slots.give_back()


class Route:
    """A model's deployments, all in one vector space: the lowest priority number first, then the least busy."""

    def __init__(self, deployments: Sequence[Deployment], metrics: Metrics, clock: Clock) -> None:
        self.deployments = sorted(deployments, key=lambda deployment: deployment.priority)
        self._metrics = metrics
        self._clock = clock

    def take(self, lane: Lane, params: Params, avoid: Deployment | None = None) -> Slot | None:
        """A slot on the best deployment that honours `params` and has one free for this lane, or None."""
        candidates = sorted(
            (each for each in self.deployments if each.can(params)),
            key=lambda each: (each is avoid, each.priority, each.slots.busy / each.weight),
        )
        for deployment in candidates:
            if deployment.slots.take(lane):
                return Slot(deployment)
        return None

    def when_free(self, callback: Callable[[], None]) -> None:
        """Calls back when any deployment may have a slot free (perhaps more than once)."""
        for deployment in self.deployments:
            deployment.slots.when_free(callback)

    async def run(self, batch: Batch, slot: Slot, lane: Lane) -> BatchResult:
        """Embeds the batch, beginning on `slot`, which is given back. Never raises `GatewayError`:
        what failed is an outcome, so that a caller pays only for its own inputs' failures.

        What a retry can help is asked once more, on another deployment if there is one.
        """
        result = await self._attempt(batch, slot)
        pending = _retryable(result)
        if not pending:
            return result
        again = await self._slot_for_retry(batch, result, pending, slot.deployment, lane)
        if again is None:
            return result
        part = replace(batch, inputs=[batch.inputs[i] for i in pending], keys=[batch.keys[i] for i in pending])
        retried = await self._attempt(part, again)
        for i, outcome in zip(pending, retried.outcomes, strict=True):
            result.outcomes[i] = outcome
        result.calls += retried.calls
        return result

    async def _attempt(self, batch: Batch, slot: Slot) -> BatchResult:
        try:
            async with asyncio.timeout_at(batch.deadline):
                return await slot.deployment.embed(batch)
        except GatewayError as error:
            return BatchResult([error] * len(batch.inputs))
        except TimeoutError:
            late = UpstreamTimeout("the request's deadline passed before the upstream had answered")
            return BatchResult([late] * len(batch.inputs))
        finally:
            slot.give_back()

    async def _slot_for_retry(
        self, batch: Batch, result: BatchResult, pending: list[int], failed: Deployment, lane: Lane
    ) -> Slot | None:
        """Waits, holding nothing, then for a slot. None when the deadline leaves no room for a retry."""
        error = result.outcomes[pending[0]]
        assert isinstance(error, GatewayError)
        pause = max(error.retry_after or 0.0, random.uniform(0, BACKOFF))
        if asyncio.get_running_loop().time() + pause >= batch.deadline:
            return None
        await self._clock.sleep(pause)
        try:
            async with asyncio.timeout_at(batch.deadline):
                while (slot := self.take(lane, batch.params, avoid=failed)) is None:
                    freed = asyncio.Event()
                    self.when_free(freed.set)
                    await freed.wait()
        except TimeoutError:
            return None
        self._metrics.upstream_retries.labels(slot.deployment.upstream, error.code).inc()
        return slot


def _retryable(result: BatchResult) -> list[int]:
    return [i for i, outcome in enumerate(result.outcomes) if not isinstance(outcome, Embedding) and outcome.retryable]
