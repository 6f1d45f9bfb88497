"""The one composition root: settings to a running ASGI application. Everything else is handed what it needs."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from app import logs
from app.api import embeddings, head, routes
from app.api.auth import Keys
from app.cache import build
from app.cache.tiers import Tiers
from app.clock import Clock, SystemClock
from app.config import Settings
from app.config.source import ConfigSource, ParentConfig, applicable
from app.config.watch import ConfigWatcher
from app.gateway import Gateway
from app.metrics import Metrics
from app.types import Store

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds beyond a request's own time for which requests are waited for, after their gateway was replaced or the
listener has closed."""

LAG_INTERVAL = 0.5
"""Seconds between two measurements of how late the event loop is."""

BuildGateway = Callable[[Settings, Gateway | None], Gateway]


@dataclass(slots=True, eq=False)
class _Generation:
    """One configuration in force: its gateway and the HTTP face over it."""

    gateway: Gateway
    keys: Keys
    route: embeddings.Embeddings
    api: Any
    """The framework's application, which knows no configuration."""
    inside: int = 0
    """Requests that came in while it was in force and are not answered yet."""


class App:
    """The ASGI application: embeddings answered at once, everything else by the framework behind it.

    A new configuration is a new generation, built whole and put in place by one assignment; requests end on the
    generation they began on. `source` is where to read the configuration again; without it, it never changes.
    """

    def __init__(
        self,
        settings: Settings,
        build_gateway: BuildGateway,
        request_log: logs.RequestLog,
        clock: Clock,
        source: ConfigSource | ParentConfig | None = None,
    ) -> None:
        self._build_gateway, self._request_log, self._clock = build_gateway, request_log, clock
        gateway = build_gateway(settings, None)
        self._metrics = gateway.metrics
        self._apis: dict[bool, Any] = {}
        """The framework's applications, by whether callers need a key: all that a configuration changes in them."""
        self._described: Any = None
        """The latest configuration's, be it in force here or in the workers."""
        self._now = self._generation(gateway)
        apart = settings.server.metrics_port is not None
        self.admin = routes.build_admin(self._metrics, lambda: self._described) if apart else None
        """/metrics and /docs for a port of their own, if the configuration gives them one."""
        self._watch = source and ConfigWatcher(source, clock, self._change_to, self._metrics.reloaded)
        self._watching: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Lock()

    def on_invalid_http(self) -> None:
        """Counts what came over a connection and was no valid HTTP request."""
        self._metrics.rejected_requests.labels("invalid_http").inc()

    def request_timeout(self) -> float:
        """Seconds that a request may take in all, by the configuration in force."""
        return self.settings.server.request_timeout

    @property
    def gateway(self) -> Gateway:
        """The one in force."""
        return self._now.gateway

    @property
    def draining(self) -> bool:
        """Whether it is about to stop, for good."""
        return self.gateway.draining

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self.gateway.settings

    async def __call__(self, scope: embeddings.Scope, receive: embeddings.Receive, send: embeddings.Sender) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        now = self._now
        if now.gateway.draining:  # answers are their connections' last: clients connect anew, to a replica that goes on
            send = _last(send)
            extensions = scope.get("extensions", {})
            if "respond" in extensions:
                extensions["respond"] = partial(extensions["respond"], last=True)
        now.inside += 1
        try:
            matched, model = embeddings.match(scope["path"])
            if matched:
                await now.route(scope, receive, send, model)
            else:
                await now.api({**scope, routes.GENERATION: now}, receive, _identified(scope, send))
        finally:
            now.inside -= 1

    def drain(self) -> None:
        """From now on the gateway is not ready. Requests are answered as ever; no further configuration takes over."""
        self.gateway.draining = True
        if self._watching:
            self._watching.cancel()

    def reload(self) -> None:
        """Has the configuration read again, soon. To be called in the event loop."""
        if self._watch:
            self._watch.ask()

    async def _lifespan(self, receive: embeddings.Receive, send: embeddings.Sender) -> None:
        """ASGI's start and stop messages around the gateway's."""
        started = await receive()
        assert started["type"] == "lifespan.startup"
        try:
            await self.gateway.start()
        except Exception as error:
            log.exception("cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        # What lives from here on lives long: collections need not look at it again (p99, bench/README.md).
        gc.collect()
        gc.freeze()
        background = [asyncio.create_task(self._watch_lag())]
        if self._watch:
            self._watching = asyncio.create_task(self._watch.run())
            background.append(self._watching)
        await send({"type": "lifespan.startup.complete"})
        stopped = await receive()
        assert stopped["type"] == "lifespan.shutdown"
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        self.drain()
        await asyncio.gather(*self._tasks)
        await self.gateway.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _watch_lag(self) -> None:
        """Measures how late the event loop is, by its own clock: what holds it up holds up every request."""
        now = asyncio.get_running_loop().time
        while True:
            due = now() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self._metrics.loop_lag.observe(max(0.0, now() - due))

    # --- reload --------------------------------------------------------------------------------------

    def _generation(self, gateway: Gateway) -> _Generation:
        keys = Keys(gateway.settings.auth)
        route = embeddings.Embeddings(gateway, keys, self._request_log)
        if keys.needed not in self._apis:
            admin = gateway.settings.server.metrics_port is None
            self._apis[keys.needed] = routes.build(self._metrics, admin=admin, keys=keys.needed)
        self._described = self._apis[keys.needed]
        return _Generation(gateway, keys, route, self._described)

    async def _change_to(self, wanted: Settings) -> None:
        settings = applicable(self.settings, wanted)
        if _alike(settings, self.settings):
            log.info("configuration read again: nothing to change")
            return
        before = self._now
        gateway = self._build_gateway(settings, before.gateway)
        try:
            await gateway.start()
            after = self._generation(gateway)
        except BaseException:
            await gateway.aclose(before.gateway)
            raise
        self._now = after
        before.gateway.hand_over(gateway)
        log.info("configuration changed")
        if before.gateway.settings.auth is not None and settings.auth is None:
            _warn_of_open(settings)  # on loopback too: until now callers had keys
        task = asyncio.create_task(self._retire(before, gateway))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def dry_run(self, settings: Settings) -> None:
        """Builds what would serve with these settings, and drops it again. Raises what building raises."""
        before = self.gateway
        gateway = self._build_gateway(settings, before)
        try:
            self._generation(gateway)
        finally:
            await gateway.aclose(before)

    async def _retire(self, old: _Generation, successor: Gateway) -> None:
        """Closes a gateway once its requests are answered. Gateways are closed one after the other, in their order:
        what one shares with its successor the successor closes, which must not be sooner."""
        async with self._closing:
            left = old.gateway.settings.server.request_timeout + GRACE
            while old.inside and left > 0:
                await self._clock.sleep(0.1)
                left -= 0.1
            await old.gateway.aclose(successor)


def _alike(one: Settings, other: Settings) -> bool:
    """Whether nothing differs, nor the order of upstreams and models: what is named first counts."""
    orders = [(*each.upstreams, *each.models) for each in (one, other)]
    return one == other and orders[0] == orders[1]


def warn_if_open(settings: Settings) -> None:
    """Warns where anybody on another machine may embed."""
    if settings.auth is None and not _is_loopback(settings.server.host):
        _warn_of_open(settings)


def _warn_of_open(settings: Settings) -> None:
    log.warning("no auth.keys: anybody who reaches %s can embed at your expense", settings.server.host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _last(send: embeddings.Sender) -> embeddings.Sender:
    """`send` that makes the response the last one on its connection."""

    async def closing(message: embeddings.Message) -> None:
        if message["type"] == "http.response.start":
            others = [header for header in message.get("headers", ()) if header[0] != b"connection"]
            message["headers"] = [*others, (b"connection", b"close")]
        await send(message)

    return closing


def _identified(scope: embeddings.Scope, send: embeddings.Sender) -> embeddings.Sender:
    """`send` that puts the request's id on the response."""
    request_id = head.request_id(dict(scope["headers"]))

    async def with_id(message: embeddings.Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
        await send(message)

    return with_id


def create_app(
    settings: Settings,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    stores: Sequence[Store] | None = None,
    clock: Clock | None = None,
    request_log: logs.RequestLog | None = None,
    source: ConfigSource | ParentConfig | None = None,
) -> App:
    """The application for these settings. `transport`, `stores` and `clock` replace the real ones; from `source`
    it reads its configuration again, when the file changes or `reload` is called."""
    clock = clock or SystemClock()
    metrics = Metrics()
    if stores is None:
        stores = build.stores(settings.cache, metrics, clock)
    cache = Tiers(stores, metrics, clock)

    def build_gateway(settings: Settings, before: Gateway | None) -> Gateway:
        return Gateway(settings, cache, metrics, clock, transport, before)

    request_log = request_log or logs.request_log("text")
    request_log.on_drop = metrics.log_dropped.inc
    return App(settings, build_gateway, request_log, clock, source)
