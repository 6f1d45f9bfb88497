"""Public model names to built pipelines; owns the upstreams and the cache, their start and their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx

from app.cache.tiers import Tiers
from app.catalog import Model
from app.config import DeploymentSettings, ModelSettings, Settings
from app.errors import ModelNotFound, UpstreamUnavailable
from app.metrics import Metrics
from app.pipeline import build
from app.pipeline.admit import Room
from app.pipeline.batcher import Batcher
from app.pipeline.call import Call
from app.pipeline.deployment import Deployment, Limits, Slots
from app.pipeline.health import Health
from app.pipeline.route import Route
from app.types import Embedder
from app.upstreams.connect import Upstream
from app.upstreams.kind import Clock, UpstreamKind

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublicModel:
    """A model as callers know it: its own name, its pipeline, and what can be said about it."""

    name: str
    embed: Embedder
    model: Model
    space: str
    deployments: tuple[Deployment, ...]


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
    ) -> None:
        self.settings, self.cache, self.metrics, self._clock = settings, cache, metrics, clock
        self.room = Room(settings.server.max_inflight, metrics)
        self.upstreams = {
            name: Upstream(name, each, kinds[each.type], clock, transport) for name, each in settings.upstreams.items()
        }
        self._slots = {name: Slots(each.max_concurrency) for name, each in settings.upstreams.items()}
        self._deployments: dict[tuple[str, Model, str], Deployment] = {}
        self._batchers: dict[tuple[tuple[int, float, int], ...], Batcher] = {}
        self._conflicts: set[str] = set()
        self.names: dict[str, PublicModel] = {}
        """Every name that can be asked for, aliases included."""
        self.started = int(clock.time())
        """Since when the models are there, as far as a caller is told: seconds since the epoch."""
        self.draining = True
        """Not ready for traffic: before the start, and while stopping."""
        self._publish()

    async def start(self) -> None:
        """Asks the upstreams that list their models; one that is away only lacks them until it is back."""
        await asyncio.gather(self.refresh(), self.cache.open())
        self.draining = False

    async def aclose(self) -> None:
        """Waits for the calls under way, writes the cache out, closes connections."""
        await asyncio.gather(*(batcher.aclose() for batcher in self._batchers.values()))
        await self.cache.close()
        await asyncio.gather(*(upstream.aclose() for upstream in self.upstreams.values()))

    async def find(self, name: str) -> PublicModel:
        """The model of this name. Raises `ModelNotFound`, having asked upstreams that might have got it since."""
        public = self.names.get(name)
        if public is None:
            await self.refresh()
            public = self.names.get(name)
        if public is None:
            upstream = self.upstreams.get(name.partition("/")[0])
            if upstream is not None and upstream.trouble:
                raise UpstreamUnavailable(f"upstream {upstream.name} cannot say what models it has")
            raise ModelNotFound(f"The model '{name[:200]}' does not exist", param="model")
        return public

    async def refresh(self) -> None:
        """Asks upstreams that list their models, each at most every few seconds, what they have now."""
        changed = await asyncio.gather(*(upstream.discover() for upstream in self.upstreams.values()))
        if any(changed):
            self._publish()

    def status(self) -> dict[str, Any]:
        """Ready or draining, and a line per upstream and cache tier. Asks nobody: probes come often."""
        upstreams = {
            name: {"status": "down" if upstream.trouble else "up", "models": len(upstream.models)}
            | ({"reason": upstream.trouble} if upstream.trouble else {})
            for name, upstream in self.upstreams.items()
        }
        state = "draining" if self.draining else "ready"
        return {"status": state, "upstreams": upstreams, "cache": self.cache.status()}

    # --- names -----------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Every name anew: configured models and aliases, then upstreams' own names, then `upstream/model`."""
        names: dict[str, PublicModel] = {}
        for name, settings in self.settings.models.items():
            public = self._configured(name, settings)
            for each in (name, *settings.aliases):
                names[each] = public
        for name, served in self._by_plain_name().items():
            public = self._public(name, tuple(served), None)
            if len({deployment.space for deployment in served}) == 1:
                names.setdefault(name, public)
            else:
                self._warn_of_spaces(name, served)
            for deployment in served:
                alone = public if len(served) == 1 else self._public(deployment.name, (deployment,), None)
                names.setdefault(deployment.name, alone)
        self.names = names

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
        overrides = {
            field: value
            for field in ("max_batch", "max_tokens_per_input", "max_tokens_per_batch", "price_per_million_tokens")
            if (value := getattr(settings, field)) is not None
        }
        deployment = self._deployment(upstream, replace(known, **overrides), wanted.space)
        return replace(deployment, weight=wanted.weight, priority=wanted.priority)

    def _deployment(self, upstream: Upstream, model: Model, space: str | None = None) -> Deployment:
        """One deployment per upstream and set of facts, shared by all names that lead to it."""
        revision = f"@{model.revision}" if model.revision else ""
        identity = space or f"{upstream.kind.name}/{model.name}{revision}"
        known = self._deployments.get((upstream.name, model, identity))
        if known is not None:
            return known
        limits = Limits(model.max_batch, model.max_tokens_per_batch)
        call = Call(
            upstream.target(model), upstream.adapter, upstream.auth, upstream.send, upstream.redact,
            self.metrics, upstream.name,
        )  # fmt: skip
        chain = build.chain(call, cache=self.cache, limits=limits)
        available = self.metrics.upstream_available.labels(upstream.name, model.name)
        health = Health(self._clock, available)
        deployment = Deployment(upstream.name, model, identity, self._slots[upstream.name], limits, health, chain)
        self._deployments[(upstream.name, model, identity)] = deployment
        return deployment

    def _public(self, name: str, deployments: tuple[Deployment, ...], settings: ModelSettings | None) -> PublicModel:
        first = deployments[0]
        batcher = self._batcher(deployments)
        embed = build.pipeline(
            batcher,
            cache=self.cache,
            space=first.space,
            models=[deployment.model for deployment in deployments],
            settings=settings,
        )
        return PublicModel(name, embed, first.model, first.space, deployments)

    def _batcher(self, deployments: tuple[Deployment, ...]) -> Batcher:
        """One batcher per set of deployments, so that names which lead to the same share calls."""
        key = tuple((id(each.limits), each.weight, each.priority) for each in deployments)
        batcher = self._batchers.get(key)
        if batcher is None:
            batcher = self._batchers[key] = Batcher(
                Route(deployments, self.metrics, self._clock), self.metrics, self._clock
            )
        return batcher

    def _warn_of_spaces(self, name: str, served: list[Deployment]) -> None:
        if name not in self._conflicts:
            self._conflicts.add(name)
            listed = ", ".join(deployment.name for deployment in served)
            log.warning("model %s: its deployments are in different vector spaces and are kept apart: %s", name, listed)
