"""Public model names to built pipelines; owns the upstreams and the cache, their start and their end."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx

from app.cache.build import shared_limits, shared_tokens
from app.cache.shared_limits import SharedLimits
from app.cache.shared_tokens import SharedTokens
from app.cache.tiers import Tiers
from app.catalog import ROLES, UNSERVED, Model
from app.config import DeploymentSettings, ModelSettings, PrefixSettings, Settings, UpstreamSettings
from app.errors import InvalidRequest, ModelNotFound, UpstreamUnavailable
from app.limits import Rates
from app.metrics import Metrics
from app.pipeline import build, canary
from app.pipeline.admit import INPUT, Room
from app.pipeline.batcher import Batcher
from app.pipeline.call import Call
from app.pipeline.deployment import Deployment, Limits, Slots
from app.pipeline.health import Health
from app.pipeline.pace import Pace
from app.pipeline.prepare import Prepare
from app.pipeline.quota import Quota
from app.pipeline.route import Route
from app.types import Embedder, Params
from app.upstreams.connect import Upstream
from app.upstreams.kind import Clock, UpstreamKind

log = logging.getLogger(__name__)


_FACTS = (
    "max_batch",
    "max_tokens_per_input",
    "max_characters_per_input",
    "max_tokens_per_batch",
    "dimension_choices",
    "instruct",
    "sparse",
    "images",
    "videos",
    "price_per_million_tokens",
)
"""What an operator may know better than the catalogue, by one name here and there."""


@dataclass(frozen=True, slots=True)
class PublicModel:
    """A model as callers know it: its own name, its pipeline, and what can be said about it."""

    name: str
    embed: Embedder
    model: Model
    space: str
    deployments: tuple[Deployment, ...]
    unfit: str | None = None
    """Why nothing but a request that says more than model and input can be served, if so."""


class Gateway:
    """The whole program but its HTTP face. `start` before use, `aclose` after."""

    def __init__(
        self,
        settings: Settings,
        kinds: Mapping[str, UpstreamKind],
        cache: Tiers,
        metrics: Metrics,
        clock: Clock,
        transport: httpx.AsyncBaseTransport | None = None,
        before: Gateway | None = None,
    ) -> None:
        """`before` is the gateway this one takes over from: what is configured as it was is shared with it, so
        that connections, tokens, health and limits learned stay. `cache` and `metrics` are then its own, too."""
        self.settings, self.cache, self.metrics, self._clock = settings, cache, metrics, clock
        server = settings.server
        largest = server.max_body + INPUT * server.max_inputs  # for which there must be room at least when it is alone
        self.room = Room(server.max_inflight, max(server.max_inflight_size, largest), metrics)
        self._tokens: SharedTokens | None = before._tokens if before else shared_tokens(settings, metrics)
        self.upstreams = {
            name: Upstream(name, each, kinds[each.type], clock, transport, self._tokens)
            for name, each in settings.upstreams.items()
        }
        self._shared: SharedLimits | None = before._shared if before else shared_limits(settings, metrics, clock)
        self.quotas = self._quotas(before)
        """By caller's name, for those whose key has a limit."""
        self._slots = {
            name: Slots(each.max_concurrency, self._pace(name, each)) for name, each in settings.upstreams.items()
        }
        self._deployments: dict[tuple[str, Model, str], Deployment] = {}
        self._batchers: dict[tuple[tuple[int, float, int], ...], Batcher] = {}
        self._canaries: dict[tuple[tuple[int, float, int], ...], canary.Canary] = {}
        self._watch: asyncio.Task[None] | None = None
        self._opens_cache = before is None
        self._conflicts: set[str] = set()
        self.names: dict[str, PublicModel] = {}
        """Every name that can be asked for, aliases included."""
        self._published: dict[str, Mapping[str, Model]] = {}
        """Of each upstream, the models that `names` was made of."""
        self.started = int(clock.time())
        """Since when the models are there, as far as a caller is told: seconds since the epoch."""
        self._remembers = settings.cache.disk is not None or settings.cache.redis is not None
        self.draining = True
        """Not ready for traffic: before the start, and while stopping."""
        if before is not None:
            self._take_over(before)
        self._publish()

    async def start(self) -> None:
        """Asks the upstreams that list their models; one that is away only lacks them until it is back."""
        await asyncio.gather(self.refresh(), *([self.cache.open()] if self._opens_cache else []))
        if self._shared and (self.quotas or any(slots.paced for slots in self._slots.values())):
            await self._shared.open()
        for trouble in (*self.unfit(), *self.unserved()):
            log.warning("%s", trouble)
        self._watch = asyncio.create_task(canary.watch(lambda: list(self._canaries.values()), self._clock))
        self.draining = False

    async def aclose(self, successor: Gateway | None = None) -> None:
        """Waits for the calls under way, writes the cache out, closes connections.

        What a `successor` shares stays as it is; deployments it does not have leave the metrics.
        """
        if self._watch is not None:
            self._watch.cancel()
        shared = successor._batchers.values() if successor else ()
        await asyncio.gather(*(batcher.aclose() for batcher in self._batchers.values() if batcher not in shared))
        kept_slots = successor._slots.values() if successor else ()
        await asyncio.gather(*(slots.aclose() for slots in self._slots.values() if slots not in kept_slots))
        if successor is None:
            if self._shared:
                await self._shared.close()
            if self._tokens:
                await self._tokens.close()
            await self.cache.close()
        else:
            kept = {(each.upstream, each.model.name) for each in successor._deployments.values()}
            for each in self._deployments.values():
                if (each.upstream, each.model.name) not in kept:
                    self.metrics.forget_deployment(each.upstream, each.model.name)
        held = successor.upstreams.values() if successor else ()
        await asyncio.gather(*(upstream.aclose() for upstream in self.upstreams.values() if upstream not in held))

    async def find(self, name: str) -> PublicModel:
        """The model of this name. Raises `ModelNotFound`, having asked upstreams that might have got it since."""
        public = self.names.get(name)
        if public is None:
            await self.refresh()
            public = self.names.get(name)
        if public is None:
            self._cannot_say(name)
            raise ModelNotFound(self._instead(name) or f"The model '{name[:200]}' does not exist", param="model")
        return public

    def _cannot_say(self, name: str) -> None:
        """Raises `UpstreamUnavailable` if an upstream that might have the model is not there to be asked: "no such
        model" would be a guess, which callers take for the last word."""
        own = self.upstreams.get(name.partition("/")[0])
        if own is not None:
            mute = [own.name] if own.trouble else []
        else:
            mute = [each.name for each in self.upstreams.values() if each.away and not each.models]
        if mute:
            told = f"no model '{name[:200]}' is known, and {', '.join(mute)} cannot say what models there are"
            raise UpstreamUnavailable(told)

    def _instead(self, name: str) -> str | None:
        """What to use for a model that an upstream has and nobody here serves."""
        for upstream in self.upstreams.values():
            told = UNSERVED.get(upstream.kind.name, {}).get(name.removeprefix(f"{upstream.name}/"))
            if told:
                return told
        return None

    async def refresh(self) -> None:
        """Asks upstreams that list their models, each at most every few seconds, what they have now."""
        await asyncio.gather(*(upstream.discover() for upstream in self.upstreams.values()))
        # By what is published and not by who asked: that may have been another gateway, or a caller who hung up.
        if any(upstream.models is not self._published.get(name) for name, upstream in self.upstreams.items()):
            self._publish()

    def unfit(self) -> list[str]:
        """A line for each model that is configured in a way in which it serves no plain request."""
        models = {public.name: public for public in self.names.values()}
        return [f"models.{name}: {public.unfit}" for name, public in models.items() if public.unfit]

    def unserved(self) -> list[str]:
        """A line for each model that a key names and nobody serves now: likely misspelt, but it may come back."""
        keys = self.settings.auth.keys.items() if self.settings.auth else ()
        named = [(name, model) for name, key in keys for model in key.models or ()]
        return [f"auth.keys.{name}.models: there is no model {m} now" for name, m in named if m not in self.names]

    def status(self) -> dict[str, Any]:
        """Ready or draining, and a line per upstream and cache tier. Asks nobody: probes come often."""
        upstreams: dict[str, dict[str, Any]] = {
            name: {"status": "down" if upstream.trouble else "up", "models": len(upstream.models)}
            | ({"reason": upstream.trouble} if upstream.trouble else {})
            for name, upstream in self.upstreams.items()
        }
        for deployment in self._deployments.values():
            health = deployment.health
            for word, told in (("out", health.out), ("trouble", health.trouble)):
                if told is not None:
                    upstreams[deployment.upstream].setdefault(word, {})[deployment.model.name] = told
        state = "draining" if self.draining else "ready"
        return {"status": state, "upstreams": upstreams, "cache": self.cache.status()}

    def _take_over(self, before: Gateway) -> None:
        """Takes what belongs to upstreams whose settings are the same."""
        self.started = before.started
        same = {
            name
            for name, each in self.upstreams.items()
            if name in before.upstreams and before.upstreams[name].settings == each.settings
        }
        for name in same:
            self.upstreams[name], self._slots[name] = before.upstreams[name], before._slots[name]
        used = {id(each.limits) for public in before.names.values() for each in public.deployments}
        self._deployments = {
            key: each for key, each in before._deployments.items() if each.upstream in same and id(each.limits) in used
        }
        known = {id(each.limits) for each in self._deployments.values()}
        for key, batcher in before._batchers.items():
            if all(limits in known for limits, _, _ in key):
                self._batchers[key] = batcher
                if key in before._canaries:
                    self._canaries[key] = before._canaries[key]

    # --- limits ----------------------------------------------------------------------------------

    def _quotas(self, before: Gateway | None) -> dict[str, Quota]:
        quotas: dict[str, Quota] = {}
        for name, key in self.settings.auth.keys.items() if self.settings.auth else ():
            rates = Rates(key.requests_per_minute, key.tokens_per_minute)
            known = before.quotas.get(name) if before else None
            if known is not None and known.rates == rates:
                quotas[name] = known
            elif rates:
                workers = self.settings.server.workers
                quotas[name] = Quota(name, rates, self._clock, self.metrics, self._shared, workers)
        return quotas

    def _pace(self, name: str, settings: UpstreamSettings) -> Pace | None:
        rates = Rates(settings.requests_per_minute, settings.tokens_per_minute)
        return Pace(name, rates, self._clock, self._shared, self.settings.server.workers) if rates else None

    # --- names -----------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Every name anew: configured models and aliases, then upstreams' own names, then `upstream/model`."""
        names: dict[str, PublicModel] = {}
        for name, settings in self.settings.models.items():
            public = self._configured(name, settings)
            for each in (name, *settings.aliases):
                names[each] = public
        for name, served in self._by_plain_name().items():
            together = None
            if len({deployment.space for deployment in served}) == 1:
                together = self._public(name, tuple(served), None)
                names.setdefault(name, together)
            else:
                self._warn_of_spaces(name, served)
            for deployment in served:
                alone = together if together and len(served) == 1 else None
                names.setdefault(deployment.name, alone or self._public(deployment.name, (deployment,), None))
        self.names = names
        self._published = {name: upstream.models for name, upstream in self.upstreams.items()}

    def _by_plain_name(self) -> dict[str, list[Deployment]]:
        served: dict[str, list[Deployment]] = {}
        for upstream in self.upstreams.values():
            for model in upstream.models.values():
                served.setdefault(model.name, []).append(self._deployment(upstream, model))
        return served

    def _configured(self, name: str, settings: ModelSettings) -> PublicModel:
        deployments = [self._configured_deployment(each, settings) for each in settings.deployments]
        space = deployments[0].space
        # What the configuration alone could tell was refused at start; a revision may differ all the same.
        same = tuple(deployment for deployment in deployments if deployment.space == space)
        if len(same) < len(deployments):
            self._warn_of_spaces(name, deployments)
        return self._public(name, same, settings)

    def _configured_deployment(self, wanted: DeploymentSettings, settings: ModelSettings) -> Deployment:
        upstream = self.upstreams[wanted.upstream]
        known = upstream.model(wanted.model)
        overrides = {field: value for field in _FACTS if (value := getattr(settings, field)) is not None}
        facts = replace(known, **overrides)
        if not upstream.adapter.media:
            facts = replace(facts, images=0, videos=0)
        if settings.prefixes is not None:
            facts = _told_by(facts, settings.prefixes)
        deployment = self._deployment(upstream, facts, wanted.space)
        return replace(deployment, weight=wanted.weight, priority=wanted.priority)

    def _deployment(self, upstream: Upstream, model: Model, space: str | None = None) -> Deployment:
        """One deployment per upstream and set of facts, shared by all names that lead to it."""
        revision = f"@{model.revision}" if model.revision else ""
        identity = space or f"{upstream.kind.name}/{model.name}{revision}"
        known = self._deployments.get((upstream.name, model, identity))
        if known is not None:
            return known
        limits = Limits(model.max_batch, model.max_tokens_per_batch, model.images, model.videos)
        call = Call(
            upstream.target(model), upstream.adapter, upstream.auth, upstream.send, upstream.redact,
            self.metrics, upstream.name,
        )  # fmt: skip
        chain = build.chain(call, cache=self.cache, limits=limits, model=model)
        available = self.metrics.upstream_available.labels(upstream.name, model.name)
        health = Health(self._clock, available, f"{upstream.name}/{model.name}")
        deployment = Deployment(upstream.name, model, identity, self._slots[upstream.name], limits, health, chain)
        self._deployments[(upstream.name, model, identity)] = deployment
        return deployment

    def _public(self, name: str, deployments: tuple[Deployment, ...], settings: ModelSettings | None) -> PublicModel:
        first = deployments[0]
        batcher = self._batcher(deployments, configured=settings is not None)
        embed = build.pipeline(
            batcher,
            name=name,
            cache=self.cache,
            space=first.space,
            models=[deployment.model for deployment in deployments],
            settings=settings,
        )
        # Brought to unit length they compare differently from what the upstream gives, whoever else serves that.
        space = f"{first.space};normalized" if settings and settings.normalize else first.space
        return PublicModel(name, embed, first.model, space, deployments, _unfit(embed))

    def _batcher(self, deployments: tuple[Deployment, ...], *, configured: bool) -> Batcher:
        """One batcher per set of deployments, so that names which lead to the same share calls."""
        key = tuple((id(each.limits), each.weight, each.priority) for each in deployments)
        batcher = self._batchers.get(key)
        if batcher is None:
            route = Route(deployments, self.metrics, self._clock)
            batcher = self._batchers[key] = Batcher(route, self.metrics, self._clock)
            # Without another deployment, or a memory that outlives us, there is nothing to compare with.
            if len({each.space for each in deployments}) == 1 and (len(deployments) > 1 or self._remembers):
                memory = self.cache if self._remembers else None
                self._canaries[key] = canary.Canary(
                    route.deployments, memory, from_start=configured and len(deployments) > 1
                )
        return batcher

    def _warn_of_spaces(self, name: str, served: list[Deployment]) -> None:
        if name not in self._conflicts:
            self._conflicts.add(name)
            listed = ", ".join(deployment.name for deployment in served)
            log.warning("model %s: its deployments are in different vector spaces and are kept apart: %s", name, listed)


def _unfit(prepare: Prepare) -> str | None:
    try:
        prepare.prepared(Params())
    except InvalidRequest as refusal:
        return f"a request without parameters is refused: {refusal.message}"
    return None


def _told_by(model: Model, prefixes: PrefixSettings) -> Model:
    """The model with the operator's prefixes. They alter vectors, so that vectors made with others are in another
    space: what is cached from before they were changed is not found any more."""
    texts = tuple(getattr(prefixes, role) for role in ROLES)
    mark = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]
    revision = f"{model.revision}+{mark}" if model.revision else f"prefixes-{mark}"
    return replace(model, roles=ROLES, default_role=None, prefixes=texts, instruct=False, revision=revision)
