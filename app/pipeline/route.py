"""Sees a batch through on a model's deployments. Retries live here and nowhere else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from app.clock import Clock
from app.deadlines import Deadline, Deadlines
from app.errors import (
    GatewayError,
    RateLimited,
    UpstreamInvalidVector,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from app.metrics import Metrics
from app.pipeline import verdict
from app.pipeline.deployment import Deployment
from app.pipeline.health import Health
from app.pipeline.parts import sub_batch
from app.pipeline.rotation import DOWN, Rotation, Slot
from app.types import Batch, BatchResult, Lane

BACKOFF = 0.2
"""Seconds: the upper bound of the jitter before the second attempt, which is the last."""
SHARE = 0.2
"""Retries earned per call: a dead upstream costs a fifth more, not three times as much."""
FLOOR, CEILING = 3.0, 20.0
"""Retries that may be made before any is earned, on credit that the first calls repay; and the most that can be saved
up."""

LONGER = 8.0
"""Seconds that a call may run past its callers' deadline, at most: shutdown waits for it."""


class Budget:
    """The retry budget: calls earn retries, and retries spend them."""

    def __init__(self) -> None:
        self._left = self._unearned = FLOOR

    def earn(self) -> None:
        if self._unearned > 0:
            self._unearned -= SHARE
        else:
            self._left = min(CEILING, self._left + SHARE)

    def spend(self, *, on_credit: bool) -> bool:
        """Spends a retry and returns True, or returns False if none is left. `on_credit` allows it even then, to be
        earned afterwards. What is owed is capped: until it is earned there are no retries but those on credit."""
        if self._left < 1 and not on_credit:
            return False
        self._left = max(-FLOOR, self._left - 1)
        return True


class _CallDeadline(Deadline, kw_only=True):
    """A batch's deadline. Callers that have waited long may leave a call less time than answers take. Such a call is
    not cut off when the deadline passes, but goes on for as long as answers take, as a call does whose callers have
    hung up: it is paid for, and callers that have joined since, or ask again, find its result. If callers with later
    deadlines have joined, half of their extra time is kept for another attempt."""

    batch: Batch
    health: Health
    started: float
    extended: bool = False

    def extension(self) -> float:
        allotted = self.batch.deadline - self.started
        if self.extended or self.health.had_ample_time(2 * allotted):
            return Deadline.extension(self)
        self.extended = True
        extra = self.batch.later_deadline() - self.batch.deadline
        return min(LONGER, self.health.ample_time - allotted, extra / 2)


class Route:
    """Embeds batches on a model's deployments, all in one vector space."""

    def __init__(
        self,
        deployments: Sequence[Deployment],
        metrics: Metrics,
        clock: Clock,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`jitter` returns random numbers from 0 to 1."""
        self.rotation = Rotation(deployments, clock, jitter)
        self._metrics, self._clock, self._jitter = metrics, clock, jitter
        self.on_need: Callable[[], None] = lambda: None
        """Called when a deployment that may soon be needed is not used before it has been compared, and has not been
        asked for that yet: at the first call, and at each that fails."""
        self._used = False
        self._budget = Budget()
        self._deadlines = Deadlines()

    async def run(self, batch: Batch, slot: Slot, lane: Lane) -> BatchResult:
        """Embeds the batch, beginning on `slot`, which is given back. Never raises `GatewayError`: a failure is the
        outcome of an input, so that callers learn only of failures of their own inputs.

        Failures that a retry can help are retried once, on another deployment if there is one. Failures that are the
        deployment's own (its key, its quota, its configuration, its dimensions), or for want of room here for a
        connection to it, are retried on another deployment only. Nothing is retried once nobody waits for the batch.
        """
        self._budget.earn()
        if not self._used:
            self._used = True
            self._hurry_comparison(batch)
        result = await self._attempt(batch, slot)
        result.deployments = (slot.deployment.name,)
        if not verdict.fully_embedded(result):
            if any(verdict.worth_retrying(outcome, True) for outcome in result.outcomes):
                self._hurry_comparison(batch)
            await self._retry(batch, result, slot, lane)
            self._report_outage(batch, result)
        return result

    def _hurry_comparison(self, batch: Batch) -> None:
        if any(each.standing.silent is None for each in self.rotation.uncompared(batch.params)):
            self.on_need()

    async def _retry(self, batch: Batch, result: BatchResult, slot: Slot, lane: Lane) -> None:
        """Makes a second call, and merges its outcomes into `result`, that of the call on `slot`."""
        elsewhere = self.rotation.other_in_reach(batch, slot.deployment)
        pending = [i for i, outcome in enumerate(result.outcomes) if verdict.worth_retrying(outcome, elsewhere)]
        if not pending or not batch.still_wanted():
            return
        retry_slot = await self._retry_slot(batch, result, pending, slot, lane, elsewhere=elsewhere)
        if retry_slot is None:
            return
        retry_batch = sub_batch(batch, pending)
        retry_slot.charge(retry_batch.inputs)
        known_bad = all(isinstance(result.outcomes[i], UpstreamInvalidVector) for i in pending)
        retried = await self._attempt(retry_batch, retry_slot, known_bad=known_bad)
        if retry_slot.deployment is not slot.deployment and verdict.found_missing_vectors(result, pending, retried):
            slot.deployment.health.doubt("it returned no vectors for inputs for which another deployment did", slot.era)
        for i, outcome in zip(pending, retried.outcomes, strict=True):
            if retry_slot.deployment is slot.deployment or not verdict.is_own_error(outcome, result.outcomes[i]):
                result.outcomes[i] = outcome
        result.calls += retried.calls
        result.late = retried.late
        names = result.deployments if len(pending) < len(result.outcomes) else ()
        result.deployments = (*names, retry_slot.deployment.name)

    def _report_outage(self, batch: Batch, result: BatchResult) -> None:
        """If every deployment is ejected or at its rate limit, and one of them ejected, turns errors that may pass into
        an outage of the model, with a time to wait. Errors that last (a key, a certificate, a name, replies that are
        not vectors) stay as they are, and so does a passed deadline."""
        states = [each.health for each in self.rotation.eligible(batch.params)]
        down = all(each.ejected or each.cooldown_remaining() for each in states) and any(
            each.ejected for each in states
        )
        if result.late or not down:
            return
        others = " or has not shown its vectors yet" if self.rotation.uncompared(batch.params) else ""
        for i, outcome in enumerate(result.outcomes):
            if verdict.is_outage(outcome):
                message = f"every deployment of this model is down{others}; the last one said: {outcome.message}"
                result.outcomes[i] = UpstreamUnavailable(message, retry_after=DOWN)

    async def _attempt(self, batch: Batch, slot: Slot, *, known_bad: bool = False) -> BatchResult:
        """`known_bad`: these inputs had no vector before, so having none again says nothing about the deployment."""
        deployment, health, now = slot.deployment, slot.deployment.health, asyncio.get_running_loop().time
        batch.on_further_call = slot.charge_call
        started = now()
        try:
            with _CallDeadline(batch.deadline, self._deadlines, batch=batch, health=health, started=started):
                result = await deployment.embed(batch)
            seconds, in_time = now() - started, now() <= batch.deadline
            slot.settle(result)
            if batch.params.dimensions is None:
                deployment.standing.check_length(result.outcomes[0])
            _judge(slot, result, seconds, in_time=in_time, known_bad=known_bad)
            return result
        except TimeoutError:
            error = UpstreamTimeout("the request's deadline passed before the upstream had answered")
            # Callers that have waited long leave a call little time: too little is not the upstream's fault.
            if health.had_ample_time(now() - started):
                health.end(error, slot.era)
            else:
                health.drop(slot.era)
            completed = batch.completed or {}
            return BatchResult([completed.get(key, error) for key in batch.keys], late=True)
        except BaseException:  # cancelled, or a bug of ours, which says nothing about the deployment
            health.abandon(slot.era)
            raise
        finally:
            slot.give_back()

    async def _retry_slot(
        self, batch: Batch, result: BatchResult, pending: list[int], failed: Slot, lane: Lane, *, elsewhere: bool
    ) -> Slot | None:
        """A slot for a retry, after a pause during which none is held. None if budget or deadline leave no room for a
        retry, or nobody waits for it by then."""
        # The parts of a batch that was split may have failed in different ways.
        errors = [error for i in pending if isinstance(error := result.outcomes[i], GatewayError)]
        # A Retry-After is about the deployment that sent it; another one can be tried soon.
        pause = self._jitter() * BACKOFF
        if not elsewhere:
            pause = max(
                pause, failed.deployment.health.cooldown_remaining(), *(each.retry_after or 0.0 for each in errors)
            )
        if asyncio.get_running_loop().time() + pause >= batch.deadline:
            result.late = True
            return None
        others_only = not any(each.retryable for each in errors)
        # Trouble of its own soon takes a deployment out of rotation; one still in rotation is worth trying.
        others = [each for each in self.rotation.eligible(batch.params) if each is not failed.deployment]
        if not self._budget.spend(on_credit=others_only and any(each.health.available() for each in others)):
            if not elsewhere:
                _give_up(result, pending)
            return None
        await self._clock.sleep(pause)
        if not batch.still_wanted():
            return None
        slot = await self.rotation.wait_for_slot(batch, lane, failed.deployment, others_only=others_only)
        if slot is not None:
            self._metrics.upstream_retries.labels(slot.deployment.upstream, errors[0].code).inc()
        elif asyncio.get_running_loop().time() >= batch.deadline:
            result.late = True
        return slot


def _judge(slot: Slot, result: BatchResult, seconds: float, *, in_time: bool, known_bad: bool) -> None:
    """Records what a completed call, which took this many `seconds`, says about its deployment."""
    health, error = slot.deployment.health, verdict.deployment_error(result)
    if isinstance(error, RateLimited):
        slot.deployment.slots.shrink()
    if verdict.is_local(error):
        health.abandon(slot.era, others_first=True)
    elif known_bad and isinstance(error, UpstreamInvalidVector):
        health.abandon(slot.era)
    elif error is not None:
        health.end(error, slot.era)
    elif in_time:
        health.record_duration(seconds)
        health.end(None, slot.era)
        slot.deployment.slots.grow()
    else:  # or one always too slow for its callers would be used forever
        health.abandon(slot.era)


def _give_up(result: BatchResult, pending: list[int]) -> None:
    """Too much has failed lately, and there is no other deployment to try. Callers are told not to retry at once
    either, or their attempts and ours would multiply."""
    for i in pending:
        outcome = result.outcomes[i]
        if isinstance(outcome, GatewayError):
            outcome.no_client_retry = True
