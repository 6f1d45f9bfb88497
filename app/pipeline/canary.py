"""A canary: one text whose vector must stay the same, on every deployment of a model and over time.

A vendor that silently changes its model, or a server that has another model under the same name, would mix vector
spaces in its users' indexes. Its deployment leaves the rotation before that.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

from app import vectors
from app.cache import keys
from app.cache.tiers import Tiers
from app.clock import Clock
from app.errors import GatewayError
from app.pipeline.deployment import Deployment
from app.types import Embedding, Params

log = logging.getLogger(__name__)

_Answer: TypeAlias = bytes | GatewayError | None
"""A deployment's vector, or the error it failed with; None if it did not answer in time."""

_UNVERIFIED = "it has not shown its vectors yet: others serve until it does"
TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。"
MIN_COSINE = 0.999
"""Cosine similarity from which two vectors count as the same text in the same space."""
CHECK_INTERVAL = 4 * 3600.0
"""Seconds between two checks."""
RECHECK_INTERVAL = 60.0
"""The same, if the last check brought no answer, or the deployment has been away since, is out of the rotation, or was
within the last `CHECK_INTERVAL`: two models may take turns behind its address, and the last check may have met only one
of them."""
ROUND = 10.0
"""Seconds between two rounds; each makes the checks that are due. A deployment that takes no traffic until it has been
compared is checked in every round, so that it is used soon after it answers; for the first time at once when its
model is first used, or the others fail."""
URGENT_INTERVAL = 1.0
"""Seconds between two checks of one canary that are made outside the rounds."""
TIMEOUT = 600.0
"""Seconds a deployment has to answer; its upstream's own `timeout` is usually shorter. One that does not answer is
judged by its traffic, not here."""
PATIENCE = 2.0
"""Seconds it has once another that callers need now has answered (`_enough`): it is asked again in the next round."""
FIRST_CHECK_TIMEOUT = 10.0
"""Seconds it has if the space has no reference yet: the first deployment's vector is to become it, and that one may
have to load its model. After that, whichever has answered will do."""


class ReferenceVectors:
    """Each space's reference vector, set by the first check: deployments are compared with it whatever their names, and
    after a change of configuration too. A cache that outlives this process keeps it for as long as the embeddings that
    it vouches for."""

    def __init__(self, cache: Tiers | None) -> None:
        """`cache`: None keeps nothing beyond this process."""
        self._cache = cache
        self._vectors: dict[str, bytes] = {}
        self._provisional: dict[str, bytes] = {}
        """Provisional references, while the cache, which may have others, does not answer."""

    def knows(self, space: str) -> bool:
        return space in self._vectors

    @property
    def persistent(self) -> bool:
        """Whether references outlive this process."""
        return self._cache is not None

    @property
    def readable(self) -> bool:
        """Whether all tiers of the cache answer, as far as is known."""
        return self._cache is None or all(status.startswith("up") for status in self._cache.status().values())

    async def recall(self, space: str) -> bool:
        """Whether this space's reference is known; asks the cache if need be."""
        if self._cache is not None and space not in self._vectors:
            (stored,) = await self._cache.get([_key(space)])
            if stored is None:  # or the lookup ran out of time, and what is stored must not be overwritten
                (stored,) = await self._cache.get([_key(space)])
            if stored is not None:
                self._vectors.setdefault(space, stored.vector)
        return space in self._vectors

    async def of(self, space: str, vector: bytes) -> bytes:
        """This space's reference. If there is none, `vector`, which a deployment has just returned, becomes it. While a
        cache that may have another does not answer, the first such `vector` is used: with a later one, a deployment
        that is checked alone would be compared with itself."""
        vector = self._provisional.get(space, vector)
        if not await self.recall(space) and not self.readable:
            return self._provisional.setdefault(space, vector)
        reference = self._vectors.setdefault(space, vector)
        if self._cache is not None:
            self._cache.put([(_key(space), Embedding(reference, 0))])
        return reference


def _key(space: str) -> bytes:
    (key,) = keys.derive(f"canary/{space}", Params(), [TEXT])
    return key


class Canary:
    """Compares the deployments of one vector space with each other and with its reference."""

    def __init__(self, deployments: Sequence[Deployment], references: ReferenceVectors, *, from_start: bool) -> None:
        # In the order in which callers' requests go to them: in doubt the first is right (`_choose_reference`).
        self._deployments = deployments
        self.upstream, self._space = deployments[0].upstream, deployments[0].space
        self._references = references
        self._from_start = from_start
        self._last_asked: dict[Deployment, tuple[float, bool]] = {}
        """When each was last asked, and whether it answered then."""
        self._checking = False
        self._hurried_at = -math.inf
        self._interchangeable = len(deployments) > 1
        """Whether they stand in for each other."""
        self._compared_without_cache = False
        """Whether they were compared with each other only, because the cache could not be read."""
        self.last_timeout = -math.inf
        """When it last waited in vain for one of them."""

    @property
    def compares(self) -> bool:
        """Whether there is anything to compare with: another deployment, or a cache that outlives this process. Also
        true while one is out of the rotation: no request goes there, so only a check can find that it is right
        again."""
        return self._interchangeable or self._references.persistent or self._any_out

    @property
    def _any_out(self) -> bool:
        return any(deployment.standing.out is not None for deployment in self._deployments)

    def due(self, now: float) -> bool:
        """Whether it is time for a check. Deployments configured to stand in for each other are compared from the
        start, and so is one that is out of the rotation. The others are compared once they are used: asking a model may
        mean loading it."""
        used = any(
            deployment.health.asked if self._interchangeable else deployment.health.answered
            for deployment in self._deployments
        )
        return (self._from_start or used or self._any_out) and not self._checking and bool(self._due_deployments(now))

    def hurry(self, now: float) -> bool:
        """Whether a check begins now, since callers need a deployment that has not been compared. Not while the space
        has no reference and one has answered callers: it may fail in passing, and the vector of another, which may be
        wrong, would become the reference."""
        known = self._references.knows(self._space)
        if not known and any(deployment.health.answered for deployment in self._deployments):
            return False
        if now - self._hurried_at < URGENT_INTERVAL or not self.due(now):
            return False
        self._hurried_at = now
        return True

    def _due_deployments(self, now: float) -> list[Deployment]:
        """The deployments that are due; all of them, once the cache can be read after a comparison without it."""
        if self._compared_without_cache and self._references.readable:
            return list(self._deployments)
        return [deployment for deployment in self._deployments if self._is_due(deployment, now)]

    def _is_due(self, deployment: Deployment, now: float) -> bool:
        """Whether its last check is long enough ago. Of several that stand in for each other, one that was ejected, and
        may come back as another model, is always due, and so is one that has not been compared yet."""
        standing = deployment.standing
        if self._interchangeable and (deployment.health.ejected or standing.unverified):
            return True
        asked_at, answered = self._last_asked.get(deployment, (-math.inf, False))
        settled = (
            answered and standing.compared and standing.out is None and now - standing.readmitted_at >= CHECK_INTERVAL
        )
        return now - asked_at >= (CHECK_INTERVAL if settled else RECHECK_INTERVAL)

    async def check(self, now: float, unresponsive: set[str]) -> None:
        """Asks every deployment that is due once. One that returns another vector is taken out of the rotation; one
        that returns the right one is let in again. One that does not answer takes no traffic while others do, as it may
        have come back as another model; unless it was compared before and has not been away since.

        `unresponsive`: upstreams that did not answer a check of this round in time; this check adds to them. If the
        space has a reference they are not asked; if it has none they are waited for less long, because the other
        deployments, which may be all that serve, are compared only after that. An upstream may hang for one model
        alone, so a deployment that was compared before and is not asked keeps its traffic.

        If the space has no reference, nothing is concluded while callers have vectors of one that did not answer.
        """
        due = self._due_deployments(now)
        if not due or self._checking:  # it waited for other checks, and is no longer due
            return
        self._checking = True
        try:
            has_reference = await self._references.recall(self._space)
            skipped = [deployment for deployment in due if has_reference and deployment.upstream in unresponsive]
            answers = await _ask_all(
                [deployment for deployment in due if deployment not in skipped],
                unresponsive,
                has_reference=has_reference,
            )
            returned = {deployment: answer for deployment, answer in answers.items() if isinstance(answer, bytes)}
            others = [deployment for deployment in self._deployments if deployment not in returned]
            undecided = not has_reference and any(map(_may_be_busy, others))
            conclusive = returned and not undecided
            reference = await self._references.of(self._space, _choose_reference(returned)) if conclusive else b""
        finally:  # also when a change of configuration cancels it: the next gateway has the same canary
            self._checking = False
        timed_out = {deployment.upstream for deployment, answer in answers.items() if answer is None}
        unresponsive |= timed_out
        if timed_out and not skipped:  # or it would be the last again in the next round, and never ask those it skipped
            self.last_timeout = now
        if undecided:
            self._last_asked |= {deployment: (now, deployment in returned) for deployment in answers}
            return
        if returned:
            self._compared_without_cache = not self._references.knows(self._space)
        unchecked = [
            deployment
            for deployment in skipped
            if deployment.health.needs_comparison or (self._interchangeable and not deployment.standing.compared)
        ]
        answers.update(dict.fromkeys(unchecked))
        for deployment, answer in answers.items():
            self._last_asked[deployment] = now, deployment in returned
            if isinstance(answer, bytes):
                self._compare(deployment, answer, reference)
            elif self._interchangeable:
                self._keep_out(deployment, answer)

    def _compare(self, deployment: Deployment, vector: bytes, expected: bytes) -> None:
        if deployment.standing.silent is not None:
            log.warning("deployment %s has now shown its vectors", deployment.name)
        deployment.standing.mark_verified(len(vector))
        self._judge(deployment, vectors.cosine(vector, expected))
        deployment.slots.notify()  # queued requests may go there now, or need not wait for it any more

    def _keep_out(self, deployment: Deployment, error: GatewayError | None) -> None:
        """Keeps it out of traffic until it answers a check, unless it has been compared and is not ejected: then it may
        only be busy. Logs the error, because no caller's call will meet it."""
        standing, why = deployment.standing, f" ({error.code}: {error.message})" if error else ""
        if standing.compared and not deployment.health.ejected:
            return
        if standing.silent is None:
            log.warning(
                "deployment %s has not shown yet that its vectors are those of %s: others are asked until it does%s",
                deployment.name,
                self._space,
                why,
            )
        standing.mark_unverified(_UNVERIFIED + why)

    def _judge(self, deployment: Deployment, cosine: float) -> None:
        if cosine >= MIN_COSINE:
            deployment.health.let_in()
            return
        reason = f"its vectors are not those of {self._space} (cosine {cosine:.4f} to the expected one)"
        if deployment.standing.out is None:
            log.error(
                "deployment %s leaves the rotation: %s; if its model was changed on purpose, give it a new "
                "`space` and embed everything anew; if not, what it gave since it was last compared may be cached",
                deployment.name,
                reason,
            )
        deployment.standing.take_out(reason)


def _may_be_busy(deployment: Deployment) -> bool:
    """Whether callers have, or may be about to have, vectors of one that did not answer a check and was not compared
    before."""
    health, standing = deployment.health, deployment.standing
    if health.ejected or standing.compared:
        return False
    return health.answered or bool(deployment.slots.busy and not (standing.unverified or health.suspect))


def _choose_reference(returned: Mapping[Deployment, bytes]) -> bytes:
    """The vector that becomes the reference: that of a deployment taken to be right so far, such as one that the
    configuration names beside one that is merely listed; of several, the first to have answered callers, or else the
    first of all."""
    return returned[min(returned, key=lambda each: (each.standing.unverified, not each.health.answered))]


async def _ask_all(
    deployments: Sequence[Deployment], unresponsive: Collection[str], *, has_reference: bool
) -> dict[Deployment, _Answer]:
    """What each answers in time, in their order. `unresponsive`: upstreams that are not waited for as long."""
    tasks = {asyncio.create_task(_ask(deployment)): deployment for deployment in deployments}
    if not tasks:
        return {}
    time = asyncio.get_running_loop().time
    until = time() + FIRST_CHECK_TIMEOUT
    try:
        _, waiting = await asyncio.wait(tasks, timeout=PATIENCE)
        while waiting and not _enough(tasks, unresponsive, has_reference=has_reference, late=time() >= until):
            left = until - time()
            _, waiting = await asyncio.wait(
                waiting, timeout=left if left > 0 else None, return_when=asyncio.FIRST_COMPLETED
            )
        return {deployment: task.result() if task.done() else None for task, deployment in tasks.items()}
    finally:
        for task in tasks:
            task.cancel()


def _enough(
    tasks: Mapping[asyncio.Task[_Answer], Deployment], unresponsive: Collection[str], *, has_reference: bool, late: bool
) -> bool:
    """Whether a deployment that callers need has answered, so that the rest need not be waited for.

    If the space has a reference, that is any but an ejected one, which may answer this text and no other while another
    one loads its model. If it has none, the first in order serves callers meanwhile: then another one is needed only
    once all before it have failed, or hang at an `unresponsive` upstream; and one that has answered callers and may
    still answer is waited for wherever it stands, because its vector becomes the reference. `late`: any that has
    answered will do.
    """
    needed, patient = has_reference, not has_reference and not late
    if patient and any(deployment.health.answered and not task.done() for task, deployment in tasks.items()):
        return False
    for task, deployment in tasks.items():
        if not task.done():
            if patient and deployment.upstream not in unresponsive:
                return False
            needed = True
        elif not isinstance(task.result(), bytes):
            needed = True
        elif late or (needed and not deployment.health.ejected):
            return True
    return False


async def _ask(deployment: Deployment) -> _Answer:
    """Its vector, or the error it failed with; None if it does not answer within `TIMEOUT`."""
    outcome = await deployment.ask(TEXT, TIMEOUT)
    if not isinstance(outcome, Embedding):
        return outcome
    deployment.standing.shown = True  # not when the others have answered: by then it may have been away again
    return outcome.vector


async def watch(canaries: Callable[[], Sequence[Canary]], clock: Clock) -> None:
    """Makes the checks that are due, round after round, until it is cancelled. Those of one upstream are made one after
    another, as it may have to load each model; those of different ones concurrently, so that none waits for one that
    hangs."""
    running: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            due: dict[str, list[Canary]] = {}
            for canary in canaries():
                if canary.due(clock.monotonic()):
                    due.setdefault(canary.upstream, []).append(canary)
            for upstream, due_canaries in due.items():
                if upstream not in running or running[upstream].done():
                    running[upstream] = asyncio.create_task(_check_in_turn(due_canaries, clock))
            await clock.sleep(ROUND)
    finally:
        for task in running.values():
            task.cancel()
        await asyncio.gather(*running.values(), return_exceptions=True)


async def check_urgent(urgent: asyncio.Queue[Canary], clock: Clock) -> None:
    """Checks the canaries in the queue at once, not in turn with the others of their upstreams, until it is
    cancelled."""
    async with asyncio.TaskGroup() as checks:
        while True:
            canary = await urgent.get()
            if canary.hurry(clock.monotonic()):
                checks.create_task(_check_in_turn([canary], clock))


async def _check_in_turn(canaries: Sequence[Canary], clock: Clock) -> None:
    """One after another, those that waited in vain most recently last: once a check finds an upstream
    unresponsive, those after it do not ask it, and each is to have its turn."""
    unresponsive: set[str] = set()
    for canary in sorted(canaries, key=lambda canary: canary.last_timeout):
        try:
            await canary.check(clock.monotonic(), unresponsive)
        except Exception:  # a bug of ours must not stop the checks of all the others
            log.exception("a canary could not be looked at")
