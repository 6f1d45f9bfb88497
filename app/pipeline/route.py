"""Hands out slots on a model's deployments and sees a batch through. Retries live here and nowhere else."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from app import tokens
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
from app.types import Batch, BatchResult, Embedding, Input, Lane, Params

BACKOFF = 0.2
"""Seconds; the upper end of the jitter before a second attempt, which is the last one."""
SHARE = 0.2
"""Retries allowed per call: a dead upstream costs a fifth more, not three times as much."""
FLOOR, CEILING = 3.0, 20.0
"""Retries that may be made before any were earned, on credit that the first calls then earn, and the most that can be
saved up."""

LONGER = 8.0
"""Seconds that a call may go on beyond its callers' deadline, at the most: stopping the gateway waits for it."""
DOWN = 5.0
"""Seconds after which a caller may ask again where all deployments of a model are down: each call still tries one of
them, so the model is back as soon as one of them is."""


class Budget:
    """Retries that calls have earned and retries have spent."""

    def __init__(self) -> None:
        self._left = self._advanced = FLOOR

    def earn(self) -> None:
        if self._advanced > 0:
            self._advanced -= SHARE
        else:
            self._left = min(CEILING, self._left + SHARE)

    def spend(self, *, on_credit: bool) -> bool:
        """Whether there is one to spend, or it may be earned afterwards: no more than a few, for what may pass is not
        asked again until then."""
        if self._left < 1 and not on_credit:
            return False
        self._left = max(-FLOOR, self._left - 1)
        return True


class Slot:
    """The right to make one call to `deployment`. Give it back once."""

    __slots__ = ("_charged", "deployment", "era")

    def __init__(self, deployment: Deployment, era: int) -> None:
        """`era`: what the deployment's health said when the call began."""
        self.deployment, self.era = deployment, era
        self._charged = 0

    def charge(self, inputs: Sequence[Input]) -> None:
        """Says what the call will carry, which is charged in tokens by estimate where there is a pace. To be called in
        the same turn as the slot was taken: until then the next call may start as if this one weighed nothing."""
        pace = self.deployment.slots.pace
        if pace:
            self._charged = sum(tokens.estimates(inputs))
            pace.charge(0, self._charged)

    def settle(self, result: BatchResult) -> None:
        """Charges what the call came to beyond that: the further calls it was split into, and the tokens of the
        upstream's own bill, if all inputs have one."""
        pace = self.deployment.slots.pace
        if pace:
            outcomes = result.outcomes
            embeddings = [each for each in outcomes if isinstance(each, Embedding)]
            billed = sum(each.tokens for each in embeddings) if len(embeddings) == len(outcomes) else self._charged
            pace.charge(result.calls - 1, billed - self._charged)


class _Until(Deadline, kw_only=True):
    """A batch's deadline. Callers that have waited long may leave a call less time than answers take. When it is due
    such a call goes on for that time, as it does for callers that have hung up: it is paid for, and callers that have
    joined since, or ask again, find what it brings. Of the time that those who have joined have beyond the deadline
    half is left, in which it can be made again."""

    batch: Batch
    health: Health
    began: float
    longer: bool = False

    def extension(self) -> float:
        had = self.batch.deadline - self.began
        if self.longer or self.health.had_ample_time(2 * had):
            return 0.0
        self.longer = True
        left = self.batch.later_deadline() - self.batch.deadline
        return min(LONGER, self.health.ample_time - had, left / 2)


class Route:
    """A model's deployments, all in one vector space. Those that have not just failed go first, among these those of
    the lowest priority number, among these the least busy.

    `jitter` gives random numbers from 0 to 1.
    """

    def __init__(
        self,
        deployments: Sequence[Deployment],
        metrics: Metrics,
        clock: Clock,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.deployments = sorted(deployments, key=lambda deployment: deployment.priority)
        self._metrics, self._clock, self._jitter = metrics, clock, jitter
        self._budget = Budget()
        self._deadlines = Deadlines()

    def take(
        self, lane: Lane, params: Params, avoid: Deployment | None = None, *, others_only: bool = False
    ) -> Slot | None:
        """A slot on the best deployment that honours `params` and has one free for this lane, or None.

        With `avoid` it is for a retry, which does not wait for the pace: there are few retries, and batches that queue
        would always be before them. `others_only`: not on the one to avoid, even if there is no other.
        """
        candidates = self._usable(params)
        if others_only:
            candidates = [each for each in candidates if each is not avoid]
        if len(candidates) > 1:
            again = avoid is not None
            candidates.sort(key=lambda each: (each is avoid, again and each.health.ejected, *self._rank(each)))
        for deployment in candidates:
            if deployment.slots.take(lane, ahead=avoid is not None):
                return Slot(deployment, deployment.health.begin())
        return None

    def _rank(self, deployment: Deployment) -> tuple[float, ...]:
        """The lowest goes first. Deployments in rotation that are equally busy for their weights, as idle ones are,
        take turns at random in proportion to these (Efraimidis, Spirakis 2006). Where none is in rotation, the one that
        has not been asked for longest: any of them may be back."""
        health, weight = deployment.health, deployment.weight
        if not health.available():
            return (health.asked,)
        load, turn = deployment.slots.busy / weight, self._jitter() ** (1 / weight)
        return health.suspect, deployment.priority, load, -turn

    def _usable(self, params: Params) -> list[Deployment]:
        """Those in rotation. Where there is none, those that were ejected, for a call that may fail is better than
        none; but not while one only rests for a rate limit and will soon be back."""
        able = self._able(params)
        available = [each for each in able if each.health.available()]
        if available or any(0 < each.health.cooldown_remaining() <= DOWN and not each.health.ejected for each in able):
            return available
        return [each for each in able if not each.health.cooldown_remaining()]

    def _able(self, params: Params) -> list[Deployment]:
        """Those that honour the parameters and are known to be in their vector space, ejected or resting ones too.
        Where none is known to be, a single one, for they may be of different spaces: of those that have not been asked
        for their vectors in vain the first that has answered callers, or else the first that is not ejected. Where
        there is no such one, all: they are compared as soon as they can be asked."""
        able = [each for each in self.deployments if each.supports(params) and each.health.out is None]
        known = [each for each in able if not each.health.unverified]
        if known:
            return known
        unseen = [each for each in able if each.health.silent is None]
        return sorted(unseen, key=lambda each: (not each.health.answered, each.health.ejected))[:1] or able

    def _in_reach(self, batch: Batch, avoid: Deployment | None) -> bool:
        """Whether another deployment than `avoid` may have a call before the deadline: now, or once its rate limit has
        passed."""
        left = batch.deadline - asyncio.get_running_loop().time()
        # Before it is asked who is usable: a rest that ended in between would be in nobody's reach.
        others = [(each, each.health.cooldown_remaining()) for each in self._able(batch.params) if each is not avoid]
        usable = self._usable(batch.params)
        return any(each in usable or 0 < rest < left for each, rest in others)

    def closed_reason(self, params: Params) -> str | None:
        """Why nothing can be embedded here with these parameters until further notice, if so."""
        out = [each.health.out for each in self.deployments]
        if not any(out):  # nearly always, and asked for every request
            return None
        reasons = [each.health.out for each in self.deployments if each.supports(params)]
        return reasons[0] if reasons and all(reasons) else None

    def rest_times(self, params: Params) -> list[float]:
        """Seconds that each deployment rests yet, after a rate limit or an ejection or for its pace; empty if none
        does. 0 where nothing is in the way, or only the one call after an ejection, which may end at any moment."""
        if not any(each.slots.pace or each.health.rest_remaining() for each in self.deployments):
            return []
        able, usable = self._able(params), self._usable(params)
        return [max(0.0 if each in usable else each.health.rest_remaining(), each.slots.wait()) for each in able]

    def time_for(self, params: Params, inputs: int, tokens: float) -> float:
        """Seconds until the first deployment would have embedded so much, as far as its pace decides."""
        usable = self._usable(params)
        return min((each.slots.time_for(inputs / each.limits.max_batch, tokens) for each in usable), default=0.0)

    def wake(self) -> None:
        """Calls back all that wait for a slot on one of these deployments, in their order."""
        for deployment in self.deployments:
            deployment.slots.notify()

    def when_free(self, callback: Callable[[], None], since: float) -> None:
        """Calls back when any deployment may have a slot free (perhaps more than once)."""
        for deployment in self.deployments:
            deployment.slots.when_free(callback, since)

    def forget(self, callback: Callable[[], None]) -> None:
        """Does not call back any more."""
        for deployment in self.deployments:
            deployment.slots.forget(callback)

    async def run(self, batch: Batch, slot: Slot, lane: Lane) -> BatchResult:
        """Embeds the batch, beginning on `slot`, which is given back. Never raises `GatewayError`: a failure is the
        outcome of an input, so that callers are told only of their own inputs' failures.

        What a retry can help is asked once more, of another deployment if there is one. What failed for trouble of this
        deployment's own (its key, its quota, its configuration, its dimensions), or because there was no room here for
        a connection to it, is asked of another one only. What nobody waits for any more is not asked again.
        """
        self._budget.earn()
        result = await self._attempt(batch, slot)
        result.deployments = (slot.deployment.name,)
        if not verdict.whole(result):
            await self._retry(batch, result, slot, lane)
            self._tell_all_down(batch, result)
        return result

    async def _retry(self, batch: Batch, result: BatchResult, slot: Slot, lane: Lane) -> None:
        """Makes a second call, and puts what it brings into `result`, which is what the call on `slot` came to."""
        elsewhere = self._in_reach(batch, slot.deployment)
        pending = [i for i, outcome in enumerate(result.outcomes) if verdict.worth_asking_again(outcome, elsewhere)]
        if not pending or not batch.still_wanted():
            return
        again = await self._again(batch, result, pending, slot, lane, elsewhere=elsewhere)
        if again is None:
            return
        part = sub_batch(batch, pending)
        again.charge(part.inputs)
        known_bad = all(isinstance(result.outcomes[i], UpstreamInvalidVector) for i in pending)
        retried = await self._attempt(part, again, known_bad=known_bad)
        if again.deployment is not slot.deployment and verdict.has_what_was_none(result, pending, retried):
            slot.deployment.health.doubt("it has no vectors of inputs of which another deployment has some", slot.era)
        for i, outcome in zip(pending, retried.outcomes, strict=True):
            if again.deployment is slot.deployment or not verdict.is_its_own(outcome, result.outcomes[i]):
                result.outcomes[i] = outcome
        result.calls += retried.calls
        result.late = retried.late
        others = result.deployments if len(pending) < len(result.outcomes) else ()
        result.deployments = (*others, again.deployment.name)

    def _tell_all_down(self, batch: Batch, result: BatchResult) -> None:
        """Where every deployment has been ejected or is at its rate limit, an error that may pass is turned into an
        outage of the model, with a time to wait. An error that lasts (a key, a certificate, a name, replies that are
        none) stays what it is, and so does a passed deadline."""
        states = [each.health for each in self._able(batch.params)]
        down = all(each.ejected or each.cooldown_remaining() for each in states) and any(
            each.ejected for each in states
        )
        if result.late or not down:
            return
        for i, outcome in enumerate(result.outcomes):
            if verdict.is_outage(outcome):
                told = f"every deployment of this model is down; the last one said: {outcome.message}"
                result.outcomes[i] = UpstreamUnavailable(told, retry_after=DOWN)

    async def _attempt(self, batch: Batch, slot: Slot, *, known_bad: bool = False) -> BatchResult:
        """`known_bad`: these inputs have got no vector before, so getting none again says nothing of the deployment."""
        deployment, health, now = slot.deployment, slot.deployment.health, asyncio.get_running_loop().time
        error: GatewayError | None = None
        judged = late = False
        """Whether the call's end says anything of the deployment: a bug of ours, or no room here, does not. Whether the
        deadline ended it."""
        began = now()
        try:
            with _Until(batch.deadline, self._deadlines, batch=batch, health=health, began=began):
                result = await deployment.embed(batch)
            error, judged = verdict.of(result), True
            if error is None and now() > batch.deadline:
                judged = False  # or one that is always too slow for its callers would be asked for ever
            elif error is None:
                health.record_duration(now() - began)
            slot.settle(result)
            return result
        except TimeoutError:
            error = UpstreamTimeout("the request's deadline passed before the upstream had answered")
            # Callers that have waited long leave a call little time: too little is no fault of the upstream.
            judged, late = health.had_ample_time(now() - began), True
            completed = batch.completed or {}
            return BatchResult([completed.get(key, error) for key in batch.keys], late=True)
        finally:
            if verdict.is_ours(error) or (known_bad and isinstance(error, UpstreamInvalidVector)):
                judged = False
            if judged:
                health.end(error, slot.era)
            elif late:
                health.drop(slot.era)
            else:
                health.abandon(slot.era, others_first=verdict.is_ours(error))
            if isinstance(error, RateLimited):
                deployment.slots.shrink()
            elif judged and error is None:
                deployment.slots.grow()
            deployment.slots.give_back()

    async def _again(
        self, batch: Batch, result: BatchResult, pending: list[int], failed: Slot, lane: Lane, *, elsewhere: bool
    ) -> Slot | None:
        """A slot for a retry, after a pause in which none is held. None where budget or deadline leave no room for one,
        or nobody waits for it by then."""
        # Of a batch that was split the parts may have failed in different ways.
        errors = [error for i in pending if isinstance(error := result.outcomes[i], GatewayError)]
        # A Retry-After is about the deployment that sent it; another one can be asked soon.
        pause = self._jitter() * BACKOFF
        if not elsewhere:
            pause = max(
                pause, failed.deployment.health.cooldown_remaining(), *(each.retry_after or 0.0 for each in errors)
            )
        if asyncio.get_running_loop().time() + pause >= batch.deadline:
            result.late = True
            return None
        others_only = not any(each.retryable for each in errors)
        # Trouble of its own takes a deployment out of the rotation soon; one that is in it is not asked in vain.
        others = [each for each in self._able(batch.params) if each is not failed.deployment]
        if not self._budget.spend(on_credit=others_only and any(each.health.available() for each in others)):
            if not elsewhere:
                _give_up(result, pending)
            return None
        await self._clock.sleep(pause)
        if not batch.still_wanted():
            return None
        slot = await self._slot(batch, lane, failed.deployment, others_only=others_only)
        if slot is not None:
            self._metrics.upstream_retries.labels(slot.deployment.upstream, errors[0].code).inc()
        elif asyncio.get_running_loop().time() >= batch.deadline:
            result.late = True
        return slot

    async def _slot(self, batch: Batch, lane: Lane, avoid: Deployment, *, others_only: bool) -> Slot | None:
        since = self._clock.monotonic()
        try:
            async with asyncio.timeout_at(batch.deadline):
                while True:
                    # Asked before a slot is: a rest that ended in between would be waited for without end.
                    rest_times = [each.health.rest_remaining() for each in self._able(batch.params)]
                    slot = self.take(lane, batch.params, avoid, others_only=others_only)
                    if slot is not None or not self._in_reach(batch, avoid if others_only else None):
                        return slot
                    await self._freed(since, min(filter(None, rest_times), default=None))
        except TimeoutError:
            return None

    async def _freed(self, since: float, rest: float | None) -> None:
        """Waits until a slot may have come free, or `rest` seconds until the first deployment that rests is back."""
        freed = asyncio.Event()
        back = asyncio.get_running_loop().call_later(rest, freed.set) if rest else None
        self.when_free(freed.set, since)
        try:
            await freed.wait()
        finally:
            self.forget(freed.set)
            if back is not None:
                back.cancel()


def _give_up(result: BatchResult, pending: list[int]) -> None:
    """Too much has failed lately, and there is no other deployment to ask. The caller is told not to try again at once
    either, or its attempts and ours would multiply."""
    for i in pending:
        outcome = result.outcomes[i]
        if isinstance(outcome, GatewayError):
            outcome.no_client_retry = True
