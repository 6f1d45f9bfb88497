"""What callers can ask for: public model names, built into pipelines over deployments."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from app.cache.tiers import Tiers
from app.catalog import ROLES, Model, least, together
from app.clock import Clock
from app.config import WORDS, DeploymentSettings, ModelSettings, PrefixSettings, Settings
from app.errors import InvalidRequest
from app.metrics import Metrics
from app.pipeline import build
from app.pipeline.batcher import Batcher
from app.pipeline.call import Call
from app.pipeline.canary import Canary, Expected
from app.pipeline.deployment import Deployment, Limits, Slots
from app.pipeline.health import Health
from app.pipeline.prepare import Prepare
from app.pipeline.route import Route
from app.types import Params
from app.upstreams.connect import Upstream

log = logging.getLogger(__name__)

_FACTS = (
    "max_batch",
    "max_tokens_per_input",
    "max_characters_per_input",
    "cuts_silently",
    "max_tokens_per_batch",
    "dimension_choices",
    "instruct",
    "sparse",
    "images",
    "videos",
    "price_per_million_tokens",
)
"""What an operator may know better than the catalogue: fields of both `ModelSettings` and `Model`."""
_APART = "its deployments are in different vector spaces"


@dataclass(frozen=True, slots=True)
class PublicModel:
    """A model as callers know it: its own name, its pipeline, and what can be said about it."""

    name: str
    embed: Prepare
    dimensions: int | None
    """Length of the vectors for callers that ask for none."""
    space: str
    deployments: tuple[Deployment, ...]

    @property
    def facts(self) -> Model:
        """What is true of the model behind all its deployments. Rows and tokens of a call are those learned so far,
        which may be fewer than the catalogue has."""
        limits = [deployment.limits for deployment in self.deployments]
        return replace(
            together([deployment.model for deployment in self.deployments]),
            max_batch=min(each.max_batch for each in limits),
            max_tokens_per_batch=least(each.max_tokens_per_batch for each in limits),
        )


class Registry:
    """Every name there is, with what it takes to serve it: one deployment per upstream and set of facts, one batcher
    per set of deployments, one canary per batcher."""

    def __init__(
        self,
        settings: Settings,
        upstreams: Mapping[str, Upstream],
        slots: Mapping[str, Slots],
        cache: Tiers,
        metrics: Metrics,
        clock: Clock,
        before: Registry | None = None,
    ) -> None:
        """`slots`: each upstream's own. Of upstreams that `before` has as well, what it uses is shared with it."""
        self._settings, self._upstreams, self._slots = settings, upstreams, slots
        self._cache, self._metrics, self._clock = cache, metrics, clock
        self._expected: Expected = before._expected if before else Expected(cache if cache.lasts else None)
        """Canaries': what a space is expected to give outlives a change of configuration."""
        self._deployments: dict[tuple[str, Model, str], Deployment] = {}
        self._spaces: set[str] = set()
        """Those in which a deployment is known or taken to be right: another one there has to be compared first."""
        self._before: dict[tuple[str, str, str], Health] = {}
        """While names are made: the health of deployments that are out, and, under the configuration before, of those
        that still answer as they did. By upstream, its model, and space."""
        self._batchers: dict[tuple[Deployment, ...], tuple[Batcher, Canary]] = {}
        """One per set of deployments, so that names which lead to the same ones share calls; and their canary."""
        self._replaced: list[Batcher] = []
        """Those that no name leads to any more, and that have calls under way."""
        self._in_force: Literal["not yet", "now", "no more"] = "now" if before is None else "not yet"
        """The metrics show the deployments of the one that is. One that was serves the requests that it still has; the
        deployments it finds from then on are for these alone."""
        self._conflicts: set[str] = set()
        self.names: dict[str, PublicModel] = {}
        """Every name that can be asked for, aliases included."""
        self._listed: dict[str, Mapping[str, Model]] = {}
        """By upstream, the list of models that `names` was made from."""
        if before is not None:
            self._take_over(before)
        self.publish()

    @property
    def deployments(self) -> Iterable[Deployment]:
        return self._deployments.values()

    @property
    def canaries(self) -> list[Canary]:
        return [canary for _, canary in self._batchers.values() if canary.compares]

    def outdated(self) -> bool:
        """Whether an upstream lists other models now."""
        return any(upstream.models is not self._listed.get(name) for name, upstream in self._upstreams.items())

    def unlisted(self, public: PublicModel) -> list[Upstream]:
        """The upstreams to ask for their lists before this model is used; nearly always none. All of its upstreams,
        unless one has the list that `names` was made from and is in reach, or had the model in it: what a list says of
        a model, a revision for example, may make it another vector space."""
        for each in public.deployments:
            upstream = self._upstreams[each.upstream]
            published = upstream.models is self._listed[each.upstream]
            if published and (not upstream.away or each.model.name in upstream.models):  # nearly always
                return []
        return [self._upstreams[each.upstream] for each in public.deployments]

    def publish(self) -> None:
        """Makes every name anew, and lets go of deployments that none leads to any more, whose model its upstream has
        replaced or dropped."""
        # Out it stays also where the list only says something else of it, as how long an input may be.
        self._before |= {_identity(each): each.health for each in self.deployments if each.health.out is not None}
        gone = self._name_all()
        self._before.clear()
        if self._in_force == "now":
            self._leave(gone, self.deployments)

    def _name_all(self) -> list[Deployment]:
        """Configured models and their aliases; then the upstreams' own names, plain and as `upstream/model`; then
        `upstream/model` of what is configured and not listed. Returns the deployments that no name leads to any more.
        """
        names: dict[str, PublicModel] = {}
        for name, settings in self._settings.models.items():
            public = self._configured(name, settings)
            for each in (name, *settings.aliases):
                names[each] = public
        for name, served in self._by_plain_name().items():
            together = None
            if len({deployment.space for deployment in served}) > 1:
                self._warn_of_spaces(name, served, "are kept apart")
            elif name not in names:
                together = names[name] = self._public(name, tuple(served), None)
            for deployment in served:
                alone = together if len(served) == 1 else None
                names.setdefault(deployment.name, alone or self._public(deployment.name, (deployment,), None))
        for settings in self._settings.models.values():
            for wanted in settings.deployments:
                if (name := f"{wanted.upstream}/{wanted.model}") not in names:
                    facts = self._facts(wanted, settings)
                    names[name] = self._public(name, (self._deployment(self._upstreams[wanted.upstream], facts),), None)
        self.names = names
        self._listed = {name: upstream.models for name, upstream in self._upstreams.items()}
        return self._keep_to_names()

    def give_way(self, successor: Registry) -> None:
        """Another one is in force from now on; deployments it does not have leave the metrics."""
        self._in_force, successor._in_force = "no more", "now"
        kept = {each.health for each in successor.deployments}
        self._leave([each for each in self.deployments if each.health not in kept], successor.deployments)

    def unfit(self) -> list[str]:
        """A line for each model that is configured in a way in which it refuses requests that say no more than model
        and input."""
        models = {public.name: public.embed for public in self.names.values()}
        return [f"models.{name}: {why}" for name, embed in models.items() if (why := _unfit(embed))]

    def apart(self) -> list[str]:
        """A line for each model that not all deployments serve which it is configured to have, though all are there."""
        away = {name for name, upstream in self._upstreams.items() if upstream.trouble}
        configured = [(name, each.deployments, self.names[name]) for name, each in self._settings.models.items()]
        return [
            f"models.{name}.deployments: {_APART}; only {_named(public.deployments)} would serve it"
            for name, wanted, public in configured
            if len(public.deployments) < len(wanted) and away.isdisjoint(each.upstream for each in wanted)
        ]

    async def aclose(self, successor: Registry | None = None) -> None:
        """Waits for the calls under way, but not those of batchers that a `successor` has as well."""
        shared = successor._every_batcher() if successor else set()
        await asyncio.gather(*(batcher.aclose() for batcher in self._every_batcher() - shared))

    def _every_batcher(self) -> set[Batcher]:
        return {*(batcher for batcher, _ in self._batchers.values()), *self._replaced}

    def _take_over(self, before: Registry) -> None:
        same = {name for name, upstream in self._upstreams.items() if before._upstreams.get(name) is upstream}
        self._deployments = {key: each for key, each in before._deployments.items() if each.upstream in same}
        as_before = {each for each, now in self._upstreams.items() if now.answers_as(before._upstreams.get(each))}
        # Of several that are one and the same the worst comes last, and counts; of those that take traffic the one that
        # callers know, for one that has not been compared under a name nobody uses says nothing.
        were = sorted((each for each in before.deployments if each.upstream in as_before), key=_how_bad)
        self._before = {_identity(each): each.health for each in were}
        sound = [(space, each) for (_, _, space), each in self._before.items() if each.out is None and not each.ejected]
        sound += [(each.space, each.health) for each in self.deployments]
        # One that came beside another of its space and serves alone is never compared: what it gave callers counts.
        self._spaces = {space for space, health in sound if health.answered or not health.unproved}
        known = {each.health for each in self.deployments}
        for deployments, served in before._batchers.items():
            if all(each.health in known for each in deployments):
                self._batchers[deployments] = served

    def _keep_to_names(self) -> list[Deployment]:
        models = self.names.values()
        used = {each.health for public in models for each in public.deployments}
        gone = {key: each for key, each in self._deployments.items() if each.health not in used}
        for key in gone:
            del self._deployments[key]
        self._spaces = {each.space for each in self.deployments}
        # Also where its deployments are still there: no request comes to it, and its canary would pay for looks.
        for unused in self._batchers.keys() - {public.deployments for public in models}:
            self._replaced.append(self._batchers.pop(unused)[0])
        self._replaced = [batcher for batcher in self._replaced if batcher.busy]
        return list(gone.values())

    def _leave(self, gone: Iterable[Deployment], kept: Iterable[Deployment]) -> None:
        """Tells the metrics of deployments that get no more calls: their names are others' now, or nobody's."""
        for each in gone:
            each.health.retire()
        names = {(each.upstream, each.model.name) for each in kept}
        for upstream, model in {(each.upstream, each.model.name) for each in gone} - names:
            self._metrics.forget_deployment(upstream, model)
        for each in kept:
            each.health.show()

    def _by_plain_name(self) -> dict[str, list[Deployment]]:
        """A model whose name begins with another upstream's, as a proxy's list may have it, has no plain name: that one
        means the other's own models, whether or not they are there."""
        served: dict[str, list[Deployment]] = {}
        for upstream in self._upstreams.values():
            for model in upstream.models.values():
                deployment = self._deployment(upstream, model)
                first, slash, _ = model.name.partition("/")
                others = slash and first != upstream.name and first in self._upstreams
                served.setdefault(deployment.name if others else model.name, []).append(deployment)
        return served

    def _configured(self, name: str, settings: ModelSettings) -> PublicModel:
        deployments = [self._configured_deployment(each, settings) for each in settings.deployments]
        space = deployments[0].space
        # What the configuration alone could tell was refused at start; a revision may differ all the same.
        same = tuple(deployment for deployment in deployments if deployment.space == space)
        if len(same) < len(deployments):
            self._warn_of_spaces(name, deployments, f"only {_named(same)} serves it")
        return self._public(name, same, settings)

    def _configured_deployment(self, wanted: DeploymentSettings, settings: ModelSettings) -> Deployment:
        facts, space = self._facts(wanted, settings), wanted.space
        if settings.prefixes is not None:
            mark = _mark(settings.prefixes)
            facts = _told_by(facts, settings.prefixes, mark)
            space = f"{space}+{mark}" if space else None
        deployment = self._deployment(self._upstreams[wanted.upstream], facts, space)
        return replace(deployment, weight=wanted.weight, priority=wanted.priority)

    def _facts(self, wanted: DeploymentSettings, settings: ModelSettings) -> Model:
        """What is known of the upstream's model, and what the operator knows better."""
        upstream = self._upstreams[wanted.upstream]
        # What a dialect has no word for would be left out of a call, and the caller given a vector of something else.
        mute = {field for field in WORDS if field not in upstream.adapter.words and getattr(settings, field)}
        better = {
            field: value for field in _FACTS if field not in mute and (value := getattr(settings, field)) is not None
        }
        known = upstream.model(wanted.model)
        if settings.dimension_choices is not None:  # its server's then, and not those that are made here
            known = replace(known, cuts=None)
        return replace(known, **better)

    def _deployment(self, upstream: Upstream, model: Model, space: str | None = None) -> Deployment:
        """One deployment per upstream and set of facts, shared by all names that lead to it."""
        identity = space or model.space(upstream.kind.name)
        known = self._deployments.get((upstream.name, model, identity))
        if known is not None:
            return known
        limits = Limits(model.max_batch, model.max_tokens_per_batch, model.images, model.videos)
        call = Call(
            upstream.target(model), upstream.adapter, upstream.auth, upstream.send, upstream.redact,
            self._metrics, upstream.name,
        )  # fmt: skip
        chain = build.chain(call, cache=self._cache, limits=limits, model=model)
        show = partial(self._metrics.show_deployment, upstream.name, model.name)
        health = Health(self._clock, show, f"{upstream.name}/{model.name}")
        if self._in_force == "no more":
            health.retire()
        before = self._before.get((upstream.name, model.name, identity))
        # Until it has been compared the others of its space are asked in its place: in doubt the first is right.
        health.unproved = identity in self._spaces and (before is None or before.doubtful)
        if before is not None:
            health.answered = before.answered  # or the first by name would be right, whatever callers have been given
            if before.out is not None:
                health.stay_out(before)
        self._spaces.add(identity)
        deployment = Deployment(upstream.name, model, identity, self._slots[upstream.name], limits, health, chain)
        self._deployments[(upstream.name, model, identity)] = deployment
        return deployment

    def _public(self, name: str, deployments: tuple[Deployment, ...], settings: ModelSettings | None) -> PublicModel:
        known = self.names.get(name)
        if known is not None and known.name == name and known.deployments == deployments:
            return known  # to make thousands anew because a list has one more would hold everybody up
        first = deployments[0]
        batcher = self._batcher(deployments, configured=settings is not None)
        embed = build.pipeline(
            batcher,
            name=name,
            cache=self._cache,
            space=first.space,
            models=[deployment.model for deployment in deployments],
            settings=settings,
        )
        # Brought to unit length they compare differently from what the upstream gives, whoever else serves that.
        space = f"{first.space};normalized" if settings and settings.normalize else first.space
        dimensions = (settings and settings.dimensions) or first.model.dimensions
        return PublicModel(name, embed, dimensions, space, deployments)

    def _batcher(self, deployments: tuple[Deployment, ...], *, configured: bool) -> Batcher:
        if deployments not in self._batchers:
            route = Route(deployments, self._metrics, self._clock)
            canary = Canary(route.deployments, self._expected, from_start=configured and len(deployments) > 1)
            batcher = Batcher(route, self._metrics, self._clock, self._cache.let_go)
            self._cache.embedders.add(batcher)
            self._batchers[deployments] = batcher, canary
        return self._batchers[deployments][0]

    def _warn_of_spaces(self, name: str, served: Sequence[Deployment], so: str) -> None:
        if name not in self._conflicts:
            self._conflicts.add(name)
            log.warning("model %s: %s and %s: %s", name, _APART, so, _named(served))


def _named(deployments: Iterable[Deployment]) -> str:
    return ", ".join(deployment.name for deployment in deployments)


def _identity(deployment: Deployment) -> tuple[str, str, str]:
    return deployment.upstream, deployment.model.name, deployment.space


def _how_bad(deployment: Deployment) -> tuple[bool, ...]:
    health = deployment.health
    return health.out is not None, health.ejected, health.answered, not health.unproved


def _unfit(prepare: Prepare) -> str | None:
    try:
        prepare.prepared(Params())
    except InvalidRequest as refusal:
        return f"a request without parameters is refused: {refusal.message}"
    return None


def _mark(prefixes: PrefixSettings) -> str:
    """Tells these prefixes from others in a space's name. They alter vectors, so vectors made with others are in
    another space, even one an operator has named: what was cached before they were changed is not found any more."""
    return hashlib.sha256("\0".join(getattr(prefixes, role) for role in ROLES).encode()).hexdigest()[:8]


def _told_by(model: Model, prefixes: PrefixSettings, mark: str) -> Model:
    """The model with the operator's prefixes."""
    texts = tuple(getattr(prefixes, role) for role in ROLES)
    revision = f"{model.revision}+{mark}" if model.revision else f"prefixes-{mark}"
    return replace(
        model, roles=ROLES, default_role=None, prefixes=texts, instruct=False, instruction="", revision=revision
    )
