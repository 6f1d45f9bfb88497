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

_Said: TypeAlias = bytes | GatewayError | None
"""A deployment's vector, or what it failed with; None where it does not say in time."""

_SILENT = "it has not shown its vectors yet: others are asked until it does"
TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。"
SAME = 0.999
"""Cosine from which two vectors count as the same text in the same space."""
EVERY = 4 * 3600.0
"""Seconds between two looks."""
AGAIN = 60.0
"""The same, where the last one brought no answer."""
ROUND = 10.0
"""Seconds between two rounds of asking which look is due. In each those are looked at that take no traffic until they
have been compared: when they answer, they are to be judged and used."""
TIMEOUT = 600.0
"""Seconds a deployment has to answer; as a rule its upstream's own `timeout` is less. One that does not answer is
judged by its traffic, not here."""
PATIENCE = 2.0
"""Seconds it has where another one has answered, which is to be used, and what the space gives is known, or the first
ones have failed: the rest can be asked again."""
AT_FIRST = 10.0
"""The same, where it is not known: what the first one gives is to count, which may have to load its model. After so
long it is whoever has answered."""


class Expected:
    """What each vector space gives for the text, from the first look on: whoever is compared, under whatever name and
    configuration, is compared with that. A cache that outlives us knows it for as long as what it vouches for."""

    def __init__(self, cache: Tiers | None) -> None:
        """`cache` None: nothing is kept beyond this process."""
        self._cache = cache
        self._vectors: dict[str, bytes] = {}
        self._meanwhile: dict[str, bytes] = {}
        """What counts for as long as the cache, which may know of something else, does not answer."""

    def knows(self, space: str) -> bool:
        return space in self._vectors

    @property
    def lasts(self) -> bool:
        """Whether it is known beyond this process."""
        return self._cache is not None

    @property
    def readable(self) -> bool:
        """Whether all tiers of the cache answer, as far as is known."""
        return self._cache is None or all(status.startswith("up") for status in self._cache.status().values())

    async def recall(self, space: str) -> bool:
        """Whether it is known what this space gives, if need be by the cache."""
        if self._cache is not None and space not in self._vectors:
            (stored,) = await self._cache.get([_key(space)])
            if stored is None:  # or there was no time to look, and what is there must not be written over
                (stored,) = await self._cache.get([_key(space)])
            if stored is not None:
                self._vectors.setdefault(space, stored.vector)
        return space in self._vectors

    async def of(self, space: str, now: bytes) -> bytes:
        """`now` is what the first that answered gives: it counts where nothing else is known, from then on. While a
        cache that may know of something else does not answer it counts until it does: who is then compared alone would
        be compared with itself."""
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

    def __init__(self, deployments: Sequence[Deployment], expected: Expected, *, from_start: bool) -> None:
        # In the order in which they would be asked: in doubt the first is right, of those that have served if any has.
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
        """Whether there is anything to compare with: another deployment, or a memory that outlives us; or what took one
        out, which nobody can use, and which may have been right again for long."""
        return self._several or self._expected.lasts or self._any_out

    @property
    def _any_out(self) -> bool:
        return any(each.health.out is not None for each in self._deployments)

    def due(self, now: float) -> bool:
        """Those that were configured to stand in for each other are compared from the start, and one that is out in any
        case; all else once it is used, for to ask for a model may mean to load it."""
        used = any(each.health.asked if self._several else each.health.answered for each in self._deployments)
        return (self._from_start or used or self._any_out) and not self._looking and bool(self._to_ask(now))

    def _to_ask(self, now: float) -> list[Deployment]:
        """Those whose last answer is so long ago, and those that have given none. All, once there is something to
        compare them with. Of several that stand in for each other, also one that was ejected, and may come back another
        model, and one that has not been compared."""
        if self._unsettled and self._expected.readable:
            return list(self._deployments)
        return [each for each in self._deployments if self._is_due(each, now)]

    def _is_due(self, deployment: Deployment, now: float) -> bool:
        health = deployment.health
        if self._several and (health.ejected or health.unproved):
            return True
        asked_at, answered = self._asked.get(deployment, (-math.inf, False))
        return now - asked_at >= (EVERY if answered and health.compared else AGAIN)

    async def look(self, now: float, mute: set[str]) -> None:
        """Asks each deployment that is due once; one whose vector is another is taken out, or let in again. One that
        has never answered takes no traffic while others do: it may have been away and have come back another.

        `mute`: upstreams that have let a look of this round wait, which this one adds to. Where what the space gives is
        known they are not asked, and where it is not they are not waited for as long: the others, which may be all that
        serve, wait for this to be compared. They may hang for that model only: one that has been compared and was not
        asked keeps its traffic."""
        asked = self._to_ask(now)
        if not asked:  # it waited for others' looks, and what made it due has passed meanwhile
            return
        self._looking = True
        try:
            known = await self._expected.recall(self._space)
            left = [each for each in asked if known and each.upstream in mute]
            told = await _told([each for each in asked if each not in left], mute, known=known)
            answers = {each: said for each, said in told.items() if isinstance(said, bytes)}
            expected = await self._expected.of(self._space, _right(answers)) if answers else b""
        finally:  # or by a change of configuration, whose gateway has the same canary
            self._looking = False
        hanging = {each.upstream for each, said in told.items() if said is None}
        mute |= hanging
        if hanging and not left:  # or it would be the last again in the next round, and never ask these
            self.waited = now
        if answers:
            self._unsettled = not self._expected.knows(self._space)
        unseen = [each for each in left if each.health.doubtful or (self._several and not each.health.compared)]
        told.update(dict.fromkeys(unseen))
        for deployment, said in told.items():
            self._asked[deployment] = now, deployment in answers
            if isinstance(said, bytes):
                self._compare(deployment, said, expected)
            elif self._several:
                self._keep_out(deployment, said)

    def _compare(self, deployment: Deployment, vector: bytes, expected: bytes) -> None:
        health = deployment.health
        if health.silent is not None:
            log.warning("deployment %s has shown its vectors now", deployment.name)
        health.unproved, health.silent, health.compared = False, None, health.shown
        health.show()
        self._judge(deployment, vectors.cosine(vector, expected))
        deployment.slots.notify()  # who queues may go there now, or need not wait for it any more

    def _keep_out(self, deployment: Deployment, error: GatewayError | None) -> None:
        """Unless it has been compared and is in rotation: it may be busy. Says what it failed with, if it has: no
        caller's call will meet it."""
        health, why = deployment.health, f" ({error.code}: {error.message})" if error else ""
        if health.compared and not health.ejected:
            return
        if health.silent is None:
            log.warning(
                "deployment %s has not shown yet that its vectors are those of %s: others are asked until it does%s",
                *(deployment.name, self._space, why),
            )
        health.unproved, health.silent = True, _SILENT + why
        health.show()

    def _judge(self, deployment: Deployment, cosine: float) -> None:
        if cosine >= SAME:
            deployment.health.let_in()
            deployment.health.answers()
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


def _right(answers: Mapping[Deployment, bytes]) -> bytes:
    """What counts where nothing else is known: what callers have been given already, or else the first."""
    return answers[min(answers, key=lambda each: not each.health.answered)]


async def _told(asked: Sequence[Deployment], mute: Collection[str], *, known: bool) -> dict[Deployment, _Said]:
    """What each says in time, in the order in which they are asked. `known`: what the space gives. `mute`: upstreams
    that let others wait."""
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


def _enough(tasks: Mapping[asyncio.Task[_Said], Deployment], mute: Collection[str], *, known: bool, late: bool) -> bool:
    """Whether one has answered that is to be used before the rest have: where what the space gives is known, or the
    ones before it have failed, or are mute and have answered no caller; and not one that was ejected: it may answer
    this text and no other, while another one loads its model. Where nothing is known who has answered callers counts
    wherever it stands. `late`: whichever has."""
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


async def _ask(deployment: Deployment) -> _Said:
    """Its vector, or why there is none, if it says."""
    deadline = asyncio.get_running_loop().time() + TIMEOUT
    batch = Batch(deployment.model.name, [TEXT], [b"canary"], Params(), store=False, deadline=deadline)
    try:
        async with asyncio.timeout_at(deadline):
            (outcome,) = (await deployment.embed(batch)).outcomes
    except GatewayError as error:
        return error
    except TimeoutError:
        return None
    if not isinstance(outcome, Embedding):
        return outcome
    deployment.health.shown = True  # not once the others have answered: it may have been away again by then
    return outcome.vector


async def watch(canaries: Callable[[], Sequence[Canary]], clock: Clock) -> None:
    """Looks where it is time, now and then, for as long as the gateway lives: one model after another at an upstream,
    which may have to load each, and at no upstream later because another one hangs."""
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
    """Those last that have waited last, so that each has its turn to ask where one lets others not be asked."""
    mute: set[str] = set()
    for canary in sorted(canaries, key=lambda each: each.waited):
        try:
            await canary.look(clock.monotonic(), mute)
        except Exception:  # a bug of ours must not end the watch over all the others
            log.exception("a canary could not be looked at")
