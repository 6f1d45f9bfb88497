"""Owns the upstreams and the cache, from startup to shutdown, and knows which models there are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import httpx

from app.cache.build import shared_limits, shared_tokens
from app.cache.shared_limits import SharedLimits
from app.cache.shared_tokens import SharedTokens
from app.cache.tiers import Tiers
from app.catalog import UNSERVED
from app.clock import Clock
from app.config import Settings, UpstreamSettings
from app.errors import GatewayError, ModelNotFound
from app.limits import Rates
from app.metrics import Metrics
from app.pipeline import canary
from app.pipeline.admit import INPUT_OVERHEAD, Capacity
from app.pipeline.deployment import Slots
from app.pipeline.fleet import Fleet
from app.pipeline.pace import Pace
from app.pipeline.quota import Quota
from app.registry import PublicModel, Registry
from app.upstreams import UPSTREAMS
from app.upstreams.upstream import Upstream

log = logging.getLogger(__name__)

REFRESH_INTERVAL = 60.0
"""Seconds between two readings of the lists of models."""
RECOVERY_INTERVAL = 10.0
"""The same, while an upstream is unavailable."""


class Gateway:
    """The whole program except its HTTP layer. Call `start` before use and `aclose` after."""

    def __init__(
        self,
        settings: Settings,
        cache: Tiers,
        metrics: Metrics,
        clock: Clock,
        transport: httpx.AsyncBaseTransport | None = None,
        before: Gateway | None = None,
    ) -> None:
        """`before` is the gateway that this one replaces. Whatever is configured as it was is shared with it, so that
        connections, tokens, health and learned limits survive; `cache` and `metrics` must be the same objects."""
        self.settings, self.cache, self.metrics, self._clock = settings, cache, metrics, clock
        server = settings.server
        largest = server.max_body + INPUT_OVERHEAD * server.max_inputs  # of one request, for which there must be room
        self.capacity = Capacity(server.max_inflight, max(server.max_inflight_size, largest), metrics)
        self._tokens: SharedTokens | None = before._tokens if before else shared_tokens(settings, metrics, clock)
        self._shared: SharedLimits | None = before._shared if before else shared_limits(settings, metrics, clock)
        self.quotas = self._quotas(before)
        """By caller's name, for callers whose key has a limit."""
        self.upstreams: dict[str, Upstream] = {}
        self._slots: dict[str, Slots] = {}
        for name, upstream_settings in settings.upstreams.items():
            previous = before.upstreams.get(name) if before else None
            if previous and previous.settings == upstream_settings:  # with what it has learned
                self.upstreams[name] = previous
            else:
                self.upstreams[name] = Upstream(
                    name, upstream_settings, UPSTREAMS[upstream_settings.type], clock, transport, self._tokens
                )
                if previous:
                    self.upstreams[name].inherit_models(previous)
            self._slots[name] = self._slots_for(self.upstreams[name], before)
        self._tasks: list[asyncio.Task[None]] = []
        self._opens_cache = before is None
        self.started: int = before.started if before else int(clock.time())
        """When the models were created, as clients are told: seconds since the epoch."""
        self.draining = False
        """Whether it is shutting down, and no longer ready for traffic."""
        self.fleet: Fleet = Fleet(self.upstreams, self._slots, cache, metrics, clock, before.fleet if before else None)
        self.registry = Registry(settings, self.upstreams, self.fleet, cache)

    @property
    def names(self) -> Mapping[str, PublicModel]:
        """Every name that can be requested, aliases included."""
        return self.registry.names

    async def start(self) -> None:
        """Asks the upstreams for their models and opens the cache. An upstream that is unavailable is served once it is
        back."""
        await asyncio.gather(self.refresh(), *([self.cache.open()] if self._opens_cache else []))
        if self._shared and (self.quotas or any(slots.pace for slots in self._slots.values())):
            await self._shared.open()
        for trouble in (*self.registry.unfit(), *self.unserved()):
            log.warning("%s", trouble)
        self._tasks.append(asyncio.create_task(canary.watch(lambda: self.fleet.canaries, self._clock)))
        self._tasks.append(asyncio.create_task(canary.check_urgent(self.fleet.urgent, self._clock)))
        if any(upstream.discovers for upstream in self.upstreams.values()):
            self._tasks.append(asyncio.create_task(self._refresh_forever()))

    def hand_over(self, successor: Gateway) -> None:
        """`successor` serves from now on, and takes over the count of requests in flight."""
        self.capacity.alter(successor.capacity)
        successor.capacity = self.capacity
        self.fleet.hand_over(successor.fleet)
        for task in self._tasks:
            task.cancel()

    async def aclose(self, successor: Gateway | None = None) -> None:
        """Waits for calls in flight, flushes the cache, closes connections.

        What a `successor` shares stays open.
        """
        for task in self._tasks:
            task.cancel()
        await self.fleet.aclose(successor.fleet if successor else None)
        kept_slots = successor._slots.values() if successor else ()
        paces = [slots.pace for slots in self._slots.values() if slots not in kept_slots]
        await asyncio.gather(*(pace.aclose() for pace in paces if pace))
        if successor is None:
            if self._shared:
                await self._shared.close()
            if self._tokens:
                await self._tokens.close()
            await self.cache.close()
        kept = successor.upstreams.values() if successor else ()
        await asyncio.gather(*(upstream.aclose() for upstream in self.upstreams.values() if upstream not in kept))

    async def find(self, name: str) -> PublicModel:
        """The model of this name. Asks upstreams that may have added it since; then raises `ModelNotFound`, or the
        error for which they cannot be asked."""
        public = self.names.get(name)
        candidates = self.registry.upstreams_to_ask(public) if public else self.upstreams.values()
        if candidates:  # rarely
            await self.refresh(candidates)
            public = self.names.get(name)
        if public is None:
            raise self._unknown(name)
        return public

    def _unknown(self, name: str) -> GatewayError:
        """`ModelNotFound`; or the error of an upstream that cannot be asked, if the name begins with that upstream's,
        or is one that upstreams of its type are known to serve: "no such model" would be a guess, and callers take it
        as final."""
        named = self.upstreams.get(name.partition("/")[0])
        candidates = [named] if named else [each for each in self.upstreams.values() if not each.models]
        down = {each.name: each.trouble for each in candidates if each.trouble}
        likely = [each for each in down if named or self.upstreams[each].kind.unlisted_model(name).source]
        if likely:
            why = down[likely[0]]
            message = (
                f"no model '{name[:200]}' is known, and {', '.join(likely)} cannot say what models there are: {why}"
            )
            return type(why)(message, code=why.code, retry_after=why.retry_after)
        if instead := self._replacement_for(name):
            return ModelNotFound(instead, param="model")
        caveat = ", as far as the upstreams that can be reached know" if down else ""
        if listless := ", ".join(each.name for each in candidates if not each.lists_models):
            caveat += (
                f"; {listless} has no list of models: what else it has must be named in `models` of the configuration"
            )
        return ModelNotFound.of(name, caveat or "; GET /v1/models lists what does")

    def _replacement_for(self, name: str) -> str | None:
        """What to use instead of a model that an upstream has and the gateway cannot serve."""
        for upstream in self.upstreams.values():
            instead = UNSERVED.get(upstream.kind.name, {}).get(name.removeprefix(f"{upstream.name}/"))
            if instead:
                return instead
        return None

    async def refresh(self, upstreams: Iterable[Upstream] | None = None) -> None:
        """Asks these upstreams, or all, for their lists of models (each at most every few seconds), and publishes any
        changes."""
        targets = self.upstreams.values() if upstreams is None else upstreams
        await asyncio.gather(*(upstream.discover() for upstream in targets))
        # Compared with what is published: another gateway may have fetched the list, or a caller that has hung up.
        if self.registry.outdated():
            self.registry.publish()

    async def _refresh_forever(self) -> None:
        """Refreshes periodically: a model that was pulled again is another one, in a vector space of its own."""
        while True:
            await self._clock.sleep(
                RECOVERY_INTERVAL if any(each.unavailable for each in self.upstreams.values()) else REFRESH_INTERVAL
            )
            try:
                await self.refresh()
            except Exception:  # a bug of ours must not stop this for good
                log.exception("asking the upstreams for their models failed")

    def unserved(self) -> list[str]:
        """A line for each model that a key names and no upstream has now: probably misspelt, but it may come back."""
        keys = self.settings.auth.keys.items() if self.settings.auth else ()
        named = [(name, model) for name, key in keys for model in key.models or ()]
        return [f"auth.keys.{name}.models: no model {m} is served now" for name, m in named if m not in self.names]

    def status(self) -> dict[str, Any]:
        """Ready or draining, and a line per upstream and cache tier. Makes no calls, because probes are frequent."""
        upstreams: dict[str, dict[str, Any]] = {
            name: {"status": "down" if upstream.trouble else "up", "models": len(self.registry.served(upstream))}
            | ({"reason": upstream.trouble.message} if upstream.trouble else {})
            for name, upstream in self.upstreams.items()
        }
        for deployment in self.fleet.deployments:
            for field, problem in (("out", deployment.standing.out), ("trouble", deployment.health.problem)):
                if problem is not None:
                    upstreams[deployment.upstream].setdefault(field, {})[deployment.model.name] = problem
        state = "draining" if self.draining else "ready"
        return {"status": state, "upstreams": upstreams, "cache": self.cache.status()}

    # --- limits ----------------------------------------------------------------------------------

    def _quotas(self, before: Gateway | None) -> dict[str, Quota]:
        quotas: dict[str, Quota] = {}
        for name, key in self.settings.auth.keys.items() if self.settings.auth else ():
            rates = Rates(key.requests_per_minute, key.tokens_per_minute)
            previous = before.quotas.get(name) if before else None
            if previous is not None and previous.rates == rates:
                quotas[name] = previous
            elif rates:
                workers = self.settings.server.workers
                quotas[name] = Quota(name, rates, self._clock, self.metrics, self._shared, workers)
        return quotas

    def _slots_for(self, upstream: Upstream, before: Gateway | None) -> Slots:
        """Shared with `before` if nothing that they limit has changed, for requests in flight there still make calls.
        If it may be another server now, calls in flight to the previous one do not count, but its rates go on."""
        name, settings = upstream.name, upstream.settings
        rates, pace = _rates(settings), None
        previous = before.upstreams.get(name) if before else None
        if before and previous and _rates(previous.settings) == rates:
            slots = before._slots[name]
            if upstream.equivalent_to(previous) and settings.max_concurrency == previous.settings.max_concurrency:
                return slots
            pace = slots.pace
        if rates:
            pace = Pace(name, rates, self._clock, self._shared, self.settings.server.workers, pace)
        return Slots(settings.max_concurrency, pace)


def _rates(settings: UpstreamSettings) -> Rates:
    return Rates(settings.requests_per_minute, settings.tokens_per_minute)
