"""Everything that serves, under whatever name: one deployment per upstream and set of facts, one batcher per set of
deployments, one canary per batcher. What a change of configuration leaves unchanged lives on in the next fleet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Set
from functools import partial
from typing import Literal

from app.cache.tiers import Tiers
from app.catalog import Model
from app.clock import Clock
from app.metrics import Metrics
from app.pipeline import build
from app.pipeline.batcher import Batcher
from app.pipeline.call import Call
from app.pipeline.canary import Canary, ReferenceVectors
from app.pipeline.deployment import CallLimits, Deployment, Slots
from app.pipeline.health import Health
from app.pipeline.route import Route
from app.upstreams.upstream import Upstream


class Fleet:
    """All deployments and batchers of one configuration. Public names are rebuilt over them each time a list of models
    changes: between `begin` and `retain`."""

    def __init__(
        self,
        upstreams: Mapping[str, Upstream],
        slots: Mapping[str, Slots],
        cache: Tiers,
        metrics: Metrics,
        clock: Clock,
        before: Fleet | None = None,
    ) -> None:
        """`slots`: each upstream's own. For upstreams that `before` has as well, what it uses is shared with it."""
        self._upstreams, self._slots = upstreams, slots
        self._cache, self._metrics, self._clock = cache, metrics, clock
        self._references: ReferenceVectors = (
            before._references if before else ReferenceVectors(cache if cache.persistent else None)
        )
        """The canaries': what a space is expected to return outlives a change of configuration."""
        self.urgent: asyncio.Queue[Canary] = before.urgent if before else asyncio.Queue()
        """Those whose callers need a deployment that has not been compared."""
        self._deployments: dict[tuple[str, Model, str], Deployment] = {}
        self._spaces: set[str] = set()
        """Spaces in which a deployment is known or taken to be right: any other one there has to be compared first."""
        self._before: dict[tuple[str, str, str], Health] = {}
        """While names are rebuilt: the health of deployments that are out, and of those of the previous configuration
        whose upstreams still answer as they did. By upstream, its model, and space."""
        self._batchers: dict[tuple[Deployment, ...], tuple[Batcher, Canary]] = {}
        """One batcher and canary per set of deployments, so that names that lead to the same ones share calls."""
        self._replaced: list[Batcher] = []
        """Those that no name leads to any more and that still have calls in flight."""
        self._in_force: Literal["not yet", "now", "no more"] = "now" if before is None else "not yet"
        """The metrics show the deployments of the fleet in force. One that was in force serves the requests it still
        has, and deployments it finds from then on are for these alone."""
        if before is not None:
            self._inherit(before)

    @property
    def deployments(self) -> Iterable[Deployment]:
        return self._deployments.values()

    @property
    def canaries(self) -> list[Canary]:
        return [canary for _, canary in self._batchers.values() if canary.compares]

    def begin(self) -> None:
        """Names are about to be rebuilt. A deployment that is out stays out even if the list now says something else
        about it, such as how long an input may be."""
        self._before |= {_identity(each): each.health for each in self.deployments if each.standing.out is not None}

    def deployment(self, upstream: Upstream, model: Model, space: str | None = None) -> Deployment:
        """One deployment per upstream and set of facts, shared by all names that lead to it."""
        identity = space or model.space(upstream.kind.name)
        known = self._deployments.get((upstream.name, model, identity))
        if known is not None:
            return known
        name = f"{upstream.name}/{model.name}"
        limits = CallLimits(model.max_batch, model.max_tokens_per_batch, model.images, model.videos)
        call, clock = Call(upstream, model, self._metrics), self._clock
        chain = build.chain(call, name=name, cache=self._cache, limits=limits, model=model, clock=clock)
        health = Health(clock, partial(self._metrics.show_deployment, upstream.name, model.name), name)
        health.trouble.on_length_change = partial(self._metrics.count_length_change, upstream.name, model.name)
        if self._in_force == "no more":
            health.trouble.retire()
        before = self._before.get((upstream.name, model.name, identity))
        # Until it has been compared, the others of its space serve in its place: in doubt the first is right.
        health.standing.unverified = identity in self._spaces and (before is None or before.needs_comparison)
        if before is not None:
            health.inherit(before)
        self._spaces.add(identity)
        deployment = Deployment(upstream.name, model, identity, self._slots[upstream.name], limits, health, chain)
        self._deployments[(upstream.name, model, identity)] = deployment
        return deployment

    def batcher(self, deployments: tuple[Deployment, ...], *, configured: bool) -> Batcher:
        """`configured`: whether the operator has them stand in for each other."""
        if deployments not in self._batchers:
            route = Route(deployments, self._metrics, self._clock)
            canary = Canary(
                route.rotation.deployments, self._references, from_start=configured and len(deployments) > 1
            )
            route.on_need = partial(self.urgent.put_nowait, canary)
            batcher = Batcher(route, self._metrics, self._clock, self._cache.release_claims)
            self._cache.embedders.add(batcher)
            self._batchers[deployments] = batcher, canary
        return self._batchers[deployments][0]

    def retain(self, used: Set[tuple[Deployment, ...]]) -> None:
        """Names have been rebuilt, each over one of these sets of deployments. Drops all others, and their batchers."""
        self._before.clear()
        kept = {each.health for deployments in used for each in deployments}
        gone = {key: each for key, each in self._deployments.items() if each.health not in kept}
        for key in gone:
            del self._deployments[key]
        self._spaces = {each.space for each in self.deployments}
        # Even if its deployments are still used: no request reaches it, and its canary would pay for its checks.
        for unused in self._batchers.keys() - used:
            self._replaced.append(self._batchers.pop(unused)[0])
        self._replaced = [batcher for batcher in self._replaced if batcher.busy]
        if self._in_force == "now":
            self._retire(gone.values(), self.deployments)

    def hand_over(self, successor: Fleet) -> None:
        """The successor is in force from now on; deployments it does not have leave the metrics."""
        self._in_force, successor._in_force = "no more", "now"
        kept = {each.health for each in successor.deployments}
        self._retire([each for each in self.deployments if each.health not in kept], successor.deployments)

    async def aclose(self, successor: Fleet | None = None) -> None:
        """Waits for the calls in flight, except those of batchers that `successor` has as well."""
        shared = successor._every_batcher() if successor else set()
        await asyncio.gather(*(batcher.aclose() for batcher in self._every_batcher() - shared))

    def _every_batcher(self) -> set[Batcher]:
        return {*(batcher for batcher, _ in self._batchers.values()), *self._replaced}

    def _inherit(self, before: Fleet) -> None:
        unchanged = {name for name, upstream in self._upstreams.items() if before._upstreams.get(name) is upstream}
        self._deployments = {key: each for key, each in before._deployments.items() if each.upstream in unchanged}
        equivalent = {each for each, now in self._upstreams.items() if now.equivalent_to(before._upstreams.get(each))}
        # Of several with one identity the last counts: the worst, or, of those that take traffic, the one that callers
        # know, for one that has not been compared under a name nobody uses says nothing.
        previous = sorted((each for each in before.deployments if each.upstream in equivalent), key=_severity)
        self._before = {_identity(each): each.health for each in previous}
        sound = [
            (space, each)
            for (_, _, space), each in self._before.items()
            if each.standing.out is None and not each.ejected
        ]
        sound += [(each.space, each.health) for each in self.deployments]
        # One that joined another of its space and now serves alone is never compared: what it gave callers counts.
        self._spaces = {space for space, health in sound if health.answered or not health.standing.unverified}
        known = {each.health for each in self.deployments}
        for deployments, batcher_and_canary in before._batchers.items():
            if all(each.health in known for each in deployments):
                self._batchers[deployments] = batcher_and_canary

    def _retire(self, gone: Iterable[Deployment], kept: Iterable[Deployment]) -> None:
        """Tells the metrics which deployments get no more calls: their names now belong to others, or to nobody."""
        for each in gone:
            each.health.trouble.retire()
        names = {(each.upstream, each.model.name) for each in kept}
        for upstream, model in {(each.upstream, each.model.name) for each in gone} - names:
            self._metrics.forget_deployment(upstream, model)
        for each in kept:
            each.health.show()


def _identity(deployment: Deployment) -> tuple[str, str, str]:
    return deployment.upstream, deployment.model.name, deployment.space


def _severity(deployment: Deployment) -> tuple[bool, ...]:
    health, standing = deployment.health, deployment.standing
    return standing.out is not None, health.ejected, health.answered, not standing.unverified
