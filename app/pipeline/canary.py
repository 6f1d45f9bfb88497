"""A canary: one text whose vector must stay the same, on every deployment of a model and over time.

A vendor that changes its model without a word, or a server that has another model under the same name,
would mix vector spaces in its users' indexes. Its deployment leaves the rotation before that.
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
from app.types import Batch, Embedding, Params

log = logging.getLogger(__name__)

_Answer: TypeAlias = bytes | GatewayError | None
"""A deployment's vector, or the error it failed with; None where it does not answer in time."""

_SILENT = "it has not shown its vectors yet: others are asked until it does"
TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。"
SAME = 0.999
"""Cosine from which two vectors count as the same text in the same space."""
EVERY = 4 * 3600.0
"""Seconds between two looks."""
AGAIN = 60.0
"""The same, where the last one brought no answer, the deployment has been away since, or is out, or was in the last
`EVERY`: two models may take turns behind its address, of which one may only have had its turn."""
ROUND = 10.0
"""Seconds between two rounds, in each of which the looks that are due are made. A deployment that takes no traffic
until it has been compared is looked at in every round, so that it is used soon after it answers."""
TIMEOUT = 600.0
"""Seconds a deployment has to answer; as a rule its upstream's own `timeout` is less. One that does not answer is
judged by its traffic, not here."""
PATIENCE = 2.0
"""Seconds it has where another one has answered that callers need now (`_enough`): it is asked again in the next
round."""
AT_FIRST = 10.0
"""Seconds it has where nothing is known of the space: what the first deployment gives is to count, which may have to
load its model. After that whichever has answered counts."""


class ReferenceVectors:
    """The vector that each space gives for the text, from the first look on: deployments are compared with it whatever
    their names, and after a change of configuration too. A cache that outlives this process keeps it for as long as the
    embeddings that it vouches for."""

    def __init__(self, cache: Tiers | None) -> None:
        """`cache` None: nothing is kept beyond this process."""
        self._cache = cache
        self._vectors: dict[str, bytes] = {}
        self._meanwhile: dict[str, bytes] = {}
        """What counts while the cache, which may have another vector, does not answer."""

    def knows(self, space: str) -> bool:
        return space in self._vectors

    @property
    def persistent(self) -> bool:
        """Whether it is known beyond this process."""
        return self._cache is not None

    @property
    def readable(self) -> bool:
        """Whether all tiers of the cache answer, as far as is known."""
        return self._cache is None or all(status.startswith("up") for status in self._cache.status().values())

    async def recall(self, space: str) -> bool:
        """Whether it is known what this space gives; the cache is asked if need be."""
        if self._cache is not None and space not in self._vectors:
            (stored,) = await self._cache.get([_key(space)])
            if stored is None:  # or there was no time to look, and what is there must not be written over
                (stored,) = await self._cache.get([_key(space)])
            if stored is not None:
                self._vectors.setdefault(space, stored.vector)
        return space in self._vectors

    async def of(self, space: str, now: bytes) -> bytes:
        """What this space gives. `now`, which a deployment has just given, becomes that where nothing is known. While a
        cache that may have another vector does not answer, the first such `now` counts until it does: a later one would
        compare a deployment that is looked at alone with itself."""
        now = self._meanwhile.get(space, now)
        if not await self.recall(space) and not self.readable:
            return self._meanwhile.setdefault(space, now)
        expected = self._vectors.setdefault(space, now)
        if self._cache is not None:
            self._cache.put([(_key(space), Embedding(expected, 0))])
        return expected


def _key(space: str) -> bytes:
    (key,) = keys.derive(f"canary/{space}", Params(), [TEXT])
    return key


class Canary:
    """Compares the deployments of one vector space with each other and with what it gave before."""

    def __init__(self, deployments: Sequence[Deployment], expected: ReferenceVectors, *, from_start: bool) -> None:
        # In the order in which callers' requests go to them: in doubt the first is right (`_right`).
        self._deployments = deployments
        self.upstream, self._space = deployments[0].upstream, deployments[0].space
        self._expected = expected
        self._from_start = from_start
        self._asked: dict[Deployment, tuple[float, bool]] = {}
        """When each was last asked, and whether it answered then."""
        self._looking = False
        self._several = len(deployments) > 1
        """Whether they stand in for each other."""
        self._unsettled = False
        """Whether they were compared with each other only, because the cache could not be read."""
        self.waited = -math.inf
        """When it last waited in vain for one of them."""

    @property
    def compares(self) -> bool:
        """Whether there is anything to compare with: another deployment, or a cache that outlives this process. Also
        while one is out of the rotation: no request goes there, so only a look can find that it is right again."""
        return self._several or self._expected.persistent or self._any_out

    @property
    def _any_out(self) -> bool:
        return any(each.health.out is not None for each in self._deployments)

    def due(self, now: float) -> bool:
        """Whether it is time for a look. Deployments that were configured to stand in for each other are compared from
        the start, and so is one that is out. The others are once they are used: to ask a model may mean to load it."""
        used = any(each.health.asked if self._several else each.health.answered for each in self._deployments)
        return (self._from_start or used or self._any_out) and not self._looking and bool(self._to_ask(now))

    def _to_ask(self, now: float) -> list[Deployment]:
        """Those that are due. All of them, once the cache can be read after they were compared without it."""
        if self._unsettled and self._expected.readable:
            return list(self._deployments)
        return [each for each in self._deployments if self._is_due(each, now)]

    def _is_due(self, deployment: Deployment, now: float) -> bool:
        """Whether its last look is long enough ago. Of several that stand in for each other, one that was ejected, and
        may come back as another model, is always due, and so is one that has not been compared yet."""
        health = deployment.health
        if self._several and (health.ejected or health.unverified):
            return True
        asked_at, answered = self._asked.get(deployment, (-math.inf, False))
        settled = answered and health.compared and health.out is None and now - health.readmitted_at >= EVERY
        return now - asked_at >= (EVERY if settled else AGAIN)

    async def check(self, now: float, mute: set[str]) -> None:
        """Asks each deployment that is due once. One that has another vector is taken out of the rotation, one that has
        the right one is let in again. One that does not answer takes no traffic while others do, unless it was compared
        before and has not been away since: it may have come back as another model.

        `mute`: upstreams that did not answer a look of this round in time; this look adds to them. Where it is known
        what the space gives they are not asked, and where it is not they are waited for less long: the other
        deployments, which may be all that serve, are compared only after that. An upstream may hang for one model
        alone, so a deployment that was compared before and is not asked keeps its traffic."""
        asked = self._to_ask(now)
        if not asked:  # it waited for others' looks, and what made it due has passed meanwhile
            return
        self._looking = True
        try:
            known = await self._expected.recall(self._space)
            spared = [each for each in asked if known and each.upstream in mute]
            answers = await _ask_all([each for each in asked if each not in spared], mute, known=known)
            shown = {each: answer for each, answer in answers.items() if isinstance(answer, bytes)}
            expected = await self._expected.of(self._space, _right(shown)) if shown else b""
        finally:  # also when it is cancelled by a change of configuration: the next gateway has the same canary
            self._looking = False
        hanging = {each.upstream for each, answer in answers.items() if answer is None}
        mute |= hanging
        if hanging and not spared:  # or it would be the last again in the next round, and never ask those it spared
            self.waited = now
        if shown:
            self._unsettled = not self._expected.knows(self._space)
        unseen = [
            each for each in spared if each.health.needs_comparison or (self._several and not each.health.compared)
        ]
        answers.update(dict.fromkeys(unseen))
        for deployment, answer in answers.items():
            self._asked[deployment] = now, deployment in shown
            if isinstance(answer, bytes):
                self._compare(deployment, answer, expected)
            elif self._several:
                self._keep_out(deployment, answer)

    def _compare(self, deployment: Deployment, vector: bytes, expected: bytes) -> None:
        if deployment.health.silent is not None:
            log.warning("deployment %s has shown its vectors now", deployment.name)
        deployment.health.mark_verified()
        self._judge(deployment, vectors.cosine(vector, expected))
        deployment.slots.notify()  # who queues may go there now, or need not wait for it any more

    def _keep_out(self, deployment: Deployment, error: GatewayError | None) -> None:
        """Takes it out of traffic until it answers a look, unless it has been compared and is not ejected: then it may
        only be busy. The log tells the error, for no caller's call will meet it."""
        health, why = deployment.health, f" ({error.code}: {error.message})" if error else ""
        if health.compared and not health.ejected:
            return
        if health.silent is None:
            log.warning(
                "deployment %s has not shown yet that its vectors are those of %s: others are asked until it does%s",
                *(deployment.name, self._space, why),
            )
        health.mark_unverified(_SILENT + why)

    def _judge(self, deployment: Deployment, cosine: float) -> None:
        if cosine >= SAME:
            deployment.health.let_in()
            return
        reason = f"its vectors are not those of {self._space} (cosine {cosine:.4f} to the expected one)"
        if deployment.health.out is None:
            log.error(
                "deployment %s leaves the rotation: %s; if its model was changed on purpose, give it a new "
                "`space` and embed everything anew; if not, what it gave since it was last compared may be cached",
                deployment.name,
                reason,
            )
        deployment.health.take_out(reason)


def _right(shown: Mapping[Deployment, bytes]) -> bytes:
    """The vector that counts where nothing is known: the first one's of those that have answered callers, or else the
    first one's of all."""
    return shown[min(shown, key=lambda each: not each.health.answered)]


async def _ask_all(asked: Sequence[Deployment], mute: Collection[str], *, known: bool) -> dict[Deployment, _Answer]:
    """What each answers in time, in their order. `known`: whether it is known what the space gives. `mute`: upstreams
    that are not waited for as long."""
    tasks = {asyncio.create_task(_ask(each)): each for each in asked}
    if not tasks:
        return {}
    time = asyncio.get_running_loop().time
    until = time() + AT_FIRST
    try:
        _, waiting = await asyncio.wait(tasks, timeout=PATIENCE)
        while waiting and not _enough(tasks, mute, known=known, late=time() >= until):
            left = until - time()
            _, waiting = await asyncio.wait(
                waiting, timeout=left if left > 0 else None, return_when=asyncio.FIRST_COMPLETED
            )
        return {each: task.result() if task.done() else None for task, each in tasks.items()}
    finally:
        for task in tasks:
            task.cancel()


def _enough(
    tasks: Mapping[asyncio.Task[_Answer], Deployment], mute: Collection[str], *, known: bool, late: bool
) -> bool:
    """Whether one has answered that callers need before the rest have answered.

    Where it is known what the space gives, that is any but an ejected one, which may answer this text and no other
    while another one loads its model. Where it is not, the first in order serves callers meanwhile: then another one is
    needed once all before it have failed, or hang at a `mute` upstream; and while one that has answered callers may yet
    answer, wherever it stands, it is waited for: its vector counts. `late`: any that has answered will do."""
    needed, patient = known, not known and not late
    if patient and any(each.health.answered and not task.done() for task, each in tasks.items()):
        return False
    for task, each in tasks.items():
        if not task.done():
            if patient and each.upstream not in mute:
                return False
            needed = True
        elif not isinstance(task.result(), bytes):
            needed = True
        elif late or (needed and not each.health.ejected):
            return True
    return False


async def _ask(deployment: Deployment) -> _Answer:
    """Its vector, or the error it failed with; None where it does not answer within `TIMEOUT`."""
    deadline = asyncio.get_running_loop().time() + TIMEOUT
    batch = Batch(deployment.model.name, [TEXT], [b"canary"], Params(), store=False, deadline=deadline)
    try:
        async with asyncio.timeout_at(deadline):
            (outcome,) = (await deployment.embed(batch)).outcomes
    except TimeoutError:
        return None
    if not isinstance(outcome, Embedding):
        return outcome
    deployment.health.shown = True  # not once the others have answered: it may have been away again by then
    return outcome.vector


async def watch(canaries: Callable[[], Sequence[Canary]], clock: Clock) -> None:
    """Makes the looks that are due, round after round, until it is cancelled. At one upstream they are made one after
    the other, for it may have to load each model; at different ones side by side, so that none waits for one that
    hangs."""
    looking: dict[str, asyncio.Task[None]] = {}
    try:
        while True:
            due: dict[str, list[Canary]] = {}
            for canary in canaries():
                if canary.due(clock.monotonic()):
                    due.setdefault(canary.upstream, []).append(canary)
            for upstream, each in due.items():
                if upstream not in looking or looking[upstream].done():
                    looking[upstream] = asyncio.create_task(_look(each, clock))
            await clock.sleep(ROUND)
    finally:
        for task in looking.values():
            task.cancel()
        await asyncio.gather(*looking.values(), return_exceptions=True)


async def _look(canaries: Sequence[Canary], clock: Clock) -> None:
    """One after the other, those that waited in vain most recently last: an upstream that one finds mute those behind
    it do not ask, and each is to have its turn."""
    mute: set[str] = set()
    for canary in sorted(canaries, key=lambda each: each.waited):
        try:
            await canary.check(clock.monotonic(), mute)
        except Exception:  # a bug of ours must not end the watch over all the others
            log.exception("a canary could not be looked at")
