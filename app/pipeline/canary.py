"""A canary: one text whose vector must stay the same, on every deployment of a model and over time.

A vendor that changes its model without a word, or a server that has another model under the same name,
would mix vector spaces in its users' indexes. Its deployment leaves the rotation before that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from app import vectors
from app.cache import keys
from app.cache.tiers import Tiers
from app.clock import Clock
from app.errors import GatewayError
from app.pipeline.deployment import Deployment
from app.types import Batch, Embedding, Params

log = logging.getLogger(__name__)

TEXT = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。"
SAME = 0.999
"""Cosine from which two vectors count as the same text in the same space."""
EVERY = 4 * 3600.0
"""Seconds between two looks."""
ROUND = 60.0
"""Seconds between two rounds of asking which look is due."""
SOON = 10.0
"""The same, while one that is asked has not been compared yet: when it answers, it is to be judged and used."""
TIMEOUT = 30.0
"""Seconds a deployment has to answer; one that does not is judged by its traffic, not here."""


class Expected:
    """What each vector space gives for the text, from the first look on: whoever is compared, under whatever name and
    configuration, is compared with that. A cache that outlives us knows it for as long as what it vouches for."""

    def __init__(self, cache: Tiers | None) -> None:
        """`cache` None: nothing is kept beyond this process."""
        self._cache = cache
        self._vectors: dict[str, bytes] = {}

    def knows(self, space: str) -> bool:
        return space in self._vectors

    @property
    def readable(self) -> bool:
        """Whether all tiers of the cache answer, as far as is known."""
        return self._cache is None or all(status.startswith("up") for status in self._cache.status().values())

    async def of(self, space: str, now: bytes) -> bytes:
        """`now` is what the first that answered gives: it counts where nothing else is known, and for this once where
        a cache that may know of something else does not answer."""
        (key,) = keys.derive(f"canary/{space}", Params(), [TEXT])
        if self._cache is not None and space not in self._vectors:
            (stored,) = await self._cache.get([key])
            if stored is None:  # or there was no time to look, and what is there must not be written over
                (stored,) = await self._cache.get([key])
            if stored is None and not self.readable:
                return self._vectors.get(space, now)
            now = stored.vector if stored else now
        expected = self._vectors.setdefault(space, now)
        if self._cache is not None:
            self._cache.put([(key, Embedding(expected, 0))])
        return expected


class Canary:
    """Compares the deployments of one vector space with each other and with what it gave before."""

    def __init__(self, deployments: Sequence[Deployment], expected: Expected, *, from_start: bool) -> None:
        # In the order in which they would be asked: in doubt the first is right.
        self._deployments = deployments
        self.upstream, self._space = deployments[0].upstream, deployments[0].space
        self._expected = expected
        self._from_start = from_start
        self._looked_at: dict[Deployment, float] = {}
        """When each was last looked at; those that did not answer are not among them."""
        self._unsettled = False
        """Whether they were compared with each other only, because the cache could not be read."""
        self._missed: set[Deployment] = set()
        """Those of which the log was told that they had not answered."""

    def due(self, now: float) -> bool:
        """Those that were configured to stand in for each other are compared from the start; all else once one of them
        was asked for something, for to ask for a model may mean to load it."""
        wanted = self._from_start or any(each.health.asked for each in self._deployments)
        return wanted and bool(self._to_ask(now))

    @property
    def waits(self) -> bool:
        """Whether there is a deployment that takes no traffic until it has been compared."""
        return any(each.health.unproved for each in self._deployments)

    def _to_ask(self, now: float) -> list[Deployment]:
        """Those whose last look is so long ago, and those that did not answer: these in every round, until they do.
        All, once there is something to compare them with."""
        if self._unsettled and self._expected.readable:
            return list(self._deployments)
        looked_at = self._looked_at
        return [each for each in self._deployments if each not in looked_at or now - looked_at[each] >= EVERY]

    async def look(self, now: float) -> None:
        """Asks each deployment that is due once; one whose vector is another is taken out, or let in again. One that
        has never answered takes no traffic while others do: it may have been away and have come back another."""
        asked, before = self._to_ask(now), dict(self._looked_at)
        self._looked_at.update(dict.fromkeys(asked, now))
        try:
            found = await asyncio.gather(*(_ask(deployment) for deployment in asked))
            answered = [(each, vector) for each, vector in zip(asked, found, strict=True) if vector]
            expected = await self._expected.of(self._space, answered[0][1]) if answered else b""
        finally:  # or by a change of configuration, whose gateway has the same canary
            self._looked_at = before
        if answered:
            self._unsettled = not self._expected.knows(self._space)
        for deployment, vector in answered:
            self._looked_at[deployment] = now
            deployment.health.unproved = False
            self._judge(deployment, vectors.cosine(vector, expected))
            deployment.slots.notify()  # who queues may go there now, or need not wait for it any more
        if len(self._deployments) > 1:
            self._keep_out([each for each in asked if each not in self._looked_at])

    def _keep_out(self, silent: Sequence[Deployment]) -> None:
        for deployment in silent:
            deployment.health.unproved = True
            if deployment not in self._missed:
                self._missed.add(deployment)
                log.warning(
                    "deployment %s has not shown yet that its vectors are those of %s: others are asked until it does",
                    deployment.name,
                    self._space,
                )

    def _judge(self, deployment: Deployment, cosine: float) -> None:
        if cosine >= SAME:
            deployment.health.let_in()
            return
        reason = f"its vectors are not those of {self._space} (cosine {cosine:.4f} to the expected one)"
        if deployment.health.out is None:
            log.error(
                "deployment %s leaves the rotation: %s; if its model was changed on purpose, give it a new "
                "`space` and embed everything anew",
                deployment.name,
                reason,
            )
        deployment.health.take_out(reason)


async def _ask(deployment: Deployment) -> bytes | None:
    deadline = asyncio.get_running_loop().time() + TIMEOUT
    batch = Batch(deployment.model.name, [TEXT], [b"canary"], Params(), store=False, deadline=deadline)
    try:
        async with asyncio.timeout_at(deadline):
            (outcome,) = (await deployment.embed(batch)).outcomes
    except (GatewayError, TimeoutError):
        return None
    return outcome.vector if isinstance(outcome, Embedding) else None


async def watch(canaries: Callable[[], Sequence[Canary]], clock: Clock) -> None:
    """Looks where it is time, now and then, for as long as the gateway lives: one model after another at an upstream,
    which may have to load each, and at all upstreams at once, for one that hangs takes all of its time."""
    while True:
        due: dict[str, list[Canary]] = {}
        for canary in canaries():
            if canary.due(clock.monotonic()):
                due.setdefault(canary.upstream, []).append(canary)
        await asyncio.gather(*(_look(each, clock) for each in due.values()))
        await clock.sleep(SOON if any(canary.waits for canary in canaries()) else ROUND)


async def _look(canaries: Sequence[Canary], clock: Clock) -> None:
    for canary in canaries:
        try:
            await canary.look(clock.monotonic())
        except Exception:  # a bug of ours must not end the watch over all the others
            log.exception("a canary could not be looked at")
