"""A model's deployments and which of them takes the next call. Makes no call itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Sequence

from app import tokens
from app.clock import Clock
from app.pipeline.deployment import Deployment, honours
from app.types import Batch, BatchResult, Embedding, Input, Lane, Params

DOWN = 5.0
"""Seconds after which a caller may retry when all deployments of a model are down: each call still tries one of them,
so the model is back as soon as one of them is."""


class Slot:
    """The right to make one call to `deployment`. To be given back once."""

    __slots__ = ("_charged", "deployment", "era")

    def __init__(self, deployment: Deployment, era: int) -> None:
        """`era`: what the deployment's `Health.begin` returned for this call."""
        self.deployment, self.era = deployment, era
        self._charged = 0

    def give_back(self) -> None:
        self.deployment.slots.give_back()

    def charge(self, inputs: Sequence[Input]) -> None:
        """Charges the pace, if there is one, with the estimated tokens of what the call carries. To be called in the
        turn of the event loop in which the slot was taken: until then the next call may start as if this one weighed
        nothing."""
        pace = self.deployment.slots.pace
        if pace:
            self._charged = sum(tokens.estimates(inputs))
            pace.charge(0, self._charged)

    def charge_call(self) -> None:
        """Charges the pace, if there is one, with a further call of a batch that takes several. It does not wait for
        the pace, but others that have not begun wait for it."""
        pace = self.deployment.slots.pace
        if pace:
            pace.charge(1, 0)

    def settle(self, result: BatchResult) -> None:
        """Charges the difference to the tokens that the upstream billed, if all inputs have a bill."""
        pace = self.deployment.slots.pace
        if pace:
            outcomes = result.outcomes
            embeddings = [each for each in outcomes if isinstance(each, Embedding)]
            billed = sum(each.tokens for each in embeddings) if len(embeddings) == len(outcomes) else self._charged
            pace.charge(0, billed - self._charged)


class Rotation:
    """Hands out slots on deployments that are all in one vector space. Preferred are those that have not just failed,
    then those with the lowest priority number, then the least busy."""

    def __init__(self, deployments: Sequence[Deployment], clock: Clock, jitter: Callable[[], float]) -> None:
        """`jitter` returns random numbers from 0 to 1."""
        self.deployments = sorted(deployments, key=lambda deployment: deployment.priority)
        self._clock, self._jitter = clock, jitter

    def take(
        self, lane: Lane, params: Params, avoid: Deployment | None = None, *, others_only: bool = False
    ) -> Slot | None:
        """A slot on the best deployment that honours `params` and has one free for this lane, or None.

        `avoid`: the deployment whose call is retried, which is taken last. A retry does not wait for the pace: retries
        are few, and queued batches would always be ahead of them. `others_only`: never on `avoid`, even if there is no
        other.
        """
        candidates = self.usable(params)
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
        """A sort key: the lowest goes first. Deployments in rotation that are equally busy for their weights, as idle
        ones are, take turns at random in proportion to their weights (Efraimidis, Spirakis 2006). If none is in
        rotation, the least recently asked goes first: any of them may be back."""
        health, weight = deployment.health, deployment.weight
        if not health.available():
            return (health.asked,)
        load, draw = deployment.slots.busy / weight, self._jitter() ** (1 / weight)
        return health.suspect, deployment.priority, load, -draw

    def usable(self, params: Params) -> list[Deployment]:
        """Those in rotation. If there are none, the ejected ones, for a call that may fail is better than none; but not
        while one merely rests after a rate limit and will soon be back."""
        eligible = self.eligible(params)
        available = [each for each in eligible if each.health.available()]
        if available or any(
            0 < each.health.cooldown_remaining() <= DOWN and not each.health.ejected for each in eligible
        ):
            return available
        return [each for each in eligible if not each.health.cooldown_remaining()]

    def eligible(self, params: Params) -> list[Deployment]:
        """Those that honour the parameters and are known to be in their vector space, including ejected and resting
        ones. If none is known to be, only one, for they may be in different spaces: of those not yet asked for their
        vectors in vain, the first that has answered callers, or else the first that is not ejected. If there is no such
        one, all of them: they are compared as soon as they can be asked."""
        eligible = self._in_space(params)
        verified = [each for each in eligible if not each.standing.unverified]
        if verified:
            return verified
        not_silent = [each for each in eligible if each.standing.silent is None]
        return sorted(not_silent, key=lambda each: (not each.health.answered, each.health.ejected))[:1] or eligible

    def uncompared(self, params: Params) -> list[Deployment]:
        """Those that get no call with these parameters only because they have not been compared."""
        eligible = self.eligible(params)
        return [each for each in self._in_space(params) if each not in eligible]

    def _in_space(self, params: Params) -> list[Deployment]:
        """Those that honour the parameters, but for those known to be in another vector space."""
        return [each for each in self.deployments if honours(each.model, params) and each.standing.out is None]

    def other_in_reach(self, batch: Batch, avoid: Deployment | None) -> bool:
        """Whether a deployment other than `avoid` may take a call before the deadline: now, or once its rate limit has
        passed."""
        left = batch.deadline - asyncio.get_running_loop().time()
        # Read before `usable`: a deployment whose rest ended in between would count as out of reach.
        others = [(each, each.health.cooldown_remaining()) for each in self.eligible(batch.params) if each is not avoid]
        usable = self.usable(batch.params)
        return any(each in usable or 0 < rest < left for each, rest in others)

    def closed_reason(self, params: Params) -> str | None:
        """Why nothing can be embedded here with these parameters until further notice; None if it can."""
        out = [each.standing.out for each in self.deployments]
        if not any(out):  # nearly always, and checked for every request
            return None
        reasons = [each.standing.out for each in self.deployments if honours(each.model, params)]
        return reasons[0] if reasons and all(reasons) else None

    def rest_times(self, params: Params) -> list[float]:
        """Seconds that each deployment still rests, after a rate limit or an ejection or for its pace; empty if none
        does. 0 if nothing is in the way, or only the one call after an ejection, which may end at any moment."""
        if not any(each.slots.pace or each.health.rest_remaining() for each in self.deployments):
            return []
        eligible, usable = self.eligible(params), self.usable(params)
        return [max(0.0 if each in usable else each.health.rest_remaining(), each.slots.wait()) for each in eligible]

    def time_for(self, params: Params, ahead: Collection[tuple[int, float]]) -> float:
        """Seconds until the first deployment may take a call after what is `ahead`, as far as its pace decides: the
        inputs and bytes of each queue, which share no call. A byte is about a quarter of a token."""
        tokens = sum(size for _, size in ahead) / 4
        return min(
            (
                each.slots.time_for(sum(math.ceil(inputs / each.limits.max_batch) for inputs, _ in ahead), tokens)
                for each in self.usable(params)
            ),
            default=0.0,
        )

    def wake(self) -> None:
        """Calls back everyone who waits for a slot on one of these deployments, in their order."""
        for deployment in self.deployments:
            deployment.slots.notify()

    def when_free(self, callback: Callable[[], None], since: float) -> None:
        """Calls back when any deployment may have a free slot, perhaps more than once."""
        for deployment in self.deployments:
            deployment.slots.when_free(callback, since)

    def forget(self, callback: Callable[[], None]) -> None:
        """Cancels `when_free`."""
        for deployment in self.deployments:
            deployment.slots.forget(callback)

    async def wait_for_slot(self, batch: Batch, lane: Lane, avoid: Deployment, *, others_only: bool) -> Slot | None:
        """Waits for a slot to retry a call that failed on `avoid`. None if no deployment is in reach of the batch's
        deadline, or once that has passed."""
        since = self._clock.monotonic()
        try:
            async with asyncio.timeout_at(batch.deadline):
                while True:
                    # Read before a slot is taken: a rest that ended in between would be waited for without end.
                    rest_times = [each.health.rest_remaining() for each in self.eligible(batch.params)]
                    slot = self.take(lane, batch.params, avoid, others_only=others_only)
                    if slot is not None or not self.other_in_reach(batch, avoid if others_only else None):
                        return slot
                    await self._wait_until_free(since, min(filter(None, rest_times), default=None))
        except TimeoutError:
            return None

    async def _wait_until_free(self, since: float, rest: float | None) -> None:
        """Waits until a slot may have come free, or for `rest` seconds, when the first resting deployment is back."""
        freed = asyncio.Event()
        timer = asyncio.get_running_loop().call_later(rest, freed.set) if rest else None
        self.when_free(freed.set, since)
        try:
            await freed.wait()
        finally:
            self.forget(freed.set)
            if timer is not None:
                timer.cancel()
