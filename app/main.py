"""The composition root: builds the ASGI application from settings. Everything else is handed its dependencies."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from app import logs
from app.api import embeddings, head, routes
from app.api.asgi import Message, Receive, Scope, Sender
from app.api.auth import Keys
from app.cache import build
from app.cache.store import Store
from app.cache.tiers import Tiers
from app.clock import Clock, SystemClock
from app.config import Settings
from app.config.source import ConfigSource, ParentConfig, applicable
from app.config.watch import ConfigWatcher
from app.descriptors import require_descriptor
from app.gateway import Gateway
from app.http.invalid import InvalidHttpLog
from app.metrics import Metrics
from app.tasks import Tasks

log = logging.getLogger(__name__)

GRACE = 10.0
"""Seconds to wait, beyond the request timeout, for requests in flight when their gateway has been replaced or the
listener has closed."""

LAG_INTERVAL = 0.5
"""Seconds between measurements of the event loop's lag."""

BuildGateway = Callable[[Settings, Gateway | None], Gateway]


@dataclass(slots=True, eq=False)
class _Generation:
    """One configuration in force: its gateway and the HTTP layer over it."""

    gateway: Gateway
    keys: Keys
    route: embeddings.Embeddings
    api: Any
    """The FastAPI application, which knows no configuration."""
    in_flight: int = 0
    """Requests that arrived while it was in force and are not answered yet."""


class App:
    """The ASGI application: answers embeddings itself, and passes everything else on to the FastAPI application.

    A new configuration is a new generation, built whole and then swapped in by one assignment; requests end on the
    generation they began on. `source` is where to reload the configuration from; None: it never changes.
    """

    def __init__(
        self,
        settings: Settings,
        build_gateway: BuildGateway,
        request_log: logs.RequestLog,
        clock: Clock,
        source: ConfigSource | ParentConfig | None,
    ) -> None:
        self._build_gateway, self._request_log, self._clock = build_gateway, request_log, clock
        gateway = build_gateway(settings, None)
        self._metrics = gateway.metrics
        rejected = gateway.metrics.rejected_requests
        self.on_invalid_http = InvalidHttpLog(lambda: rejected.labels("invalid_http").inc(), clock.monotonic)
        """To be called for data that is not a valid HTTP request."""
        self._apis: dict[bool, Any] = {}
        """The FastAPI applications, by whether callers need a key: nothing else in them depends on a configuration."""
        self._documented: Any = None
        """The FastAPI application of the latest configuration, whether in force here or in the workers."""
        self._current = self._generation(gateway)
        separate_port = settings.server.metrics_port is not None
        self.admin = routes.build_admin(self._metrics, lambda: self._documented) if separate_port else None
        """Serves /metrics and /docs on a port of their own, if the configuration has one."""
        self._watcher = source and ConfigWatcher(source, clock, self._change_to, self._metrics.reloaded)
        self._watching: asyncio.Task[None] | None = None
        self._tasks = Tasks()
        self._closing = asyncio.Lock()

    @property
    def gateway(self) -> Gateway:
        """The one in force."""
        return self._current.gateway

    @property
    def draining(self) -> bool:
        """Whether the application is about to stop."""
        return self.gateway.draining

    @property
    def settings(self) -> Settings:
        """Those in force."""
        return self.gateway.settings

    def request_timeout(self) -> float:
        """Seconds that a request may take. A method, for those who have to ask again: a reload may change it."""
        return self.settings.server.request_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Sender) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        generation = self._current
        if generation.gateway.draining:  # close connections after their responses: clients reconnect to another replica
            send = _with_header(send, b"connection", b"close")
            extensions = scope.get("extensions", {})
            if "respond" in extensions:
                extensions["respond"] = partial(extensions["respond"], last=True)
        generation.in_flight += 1
        try:
            matched, model = embeddings.match(scope["path"])
            if matched:
                await generation.route(scope, receive, send, model)
            else:
                request_id = head.request_id(head.by_name(scope["headers"]))
                send = _with_header(send, b"x-request-id", request_id)
                await generation.api({**scope, routes.GENERATION: generation}, receive, send)
        finally:
            generation.in_flight -= 1

    def drain(self) -> None:
        """Makes the gateway not ready and stops reloading. Requests are still answered."""
        self.gateway.draining = True
        if self._watching:
            self._watching.cancel()

    def reload(self) -> None:
        """Schedules a reload of the configuration. To be called in the event loop."""
        if self._watcher:
            self._watcher.ask()

    async def _lifespan(self, receive: Receive, send: Sender) -> None:
        """Starts and stops the gateway at ASGI's lifespan messages."""
        started = await receive()
        assert started["type"] == "lifespan.startup"
        try:
            await self.gateway.start()
        except Exception as error:
            log.exception("cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        # What is alive by now lives long, so collections need not scan it again (p99, bench/README.md).
        gc.collect()
        gc.freeze()
        background = [asyncio.create_task(self._watch_lag())]
        if self._watcher:
            self._watching = asyncio.create_task(self._watcher.run())
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
        """Measures the event loop's lag, by its own clock: whatever blocks the loop delays every request. Also warns
        while no file descriptor is left: the event loop then closes new connections and tells nobody."""
        now = asyncio.get_running_loop().time
        seldom = logs.Seldom(now)
        while True:
            due = now() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self._metrics.loop_lag.observe(max(0.0, now() - due))
            try:
                require_descriptor()
            except OSError as error:
                if seldom():
                    log.warning("new connections are closed unanswered (ulimit -n): %s", error.strerror)

    # --- reload --------------------------------------------------------------------------------------

    def _generation(self, gateway: Gateway) -> _Generation:
        keys = Keys(gateway.settings.auth)
        route = embeddings.Embeddings(gateway, keys, self._request_log)
        if keys.needed not in self._apis:
            admin = gateway.settings.server.metrics_port is None
            self._apis[keys.needed] = routes.build(self._metrics, admin=admin, keys=keys.needed)
        self._documented = self._apis[keys.needed]
        return _Generation(gateway, keys, route, self._documented)

    async def _change_to(self, wanted: Settings) -> None:
        settings = applicable(self.settings, wanted)
        if _same_settings(settings, self.settings):
            log.info("configuration reloaded: nothing has changed")
            return
        before = self._current
        gateway = self._build_gateway(settings, before.gateway)
        try:
            await gateway.start()
            after = self._generation(gateway)
        except BaseException:
            await gateway.aclose(before.gateway)
            raise
        self._current = after
        before.gateway.hand_over(gateway)
        log.info("configuration changed")
        if before.gateway.settings.auth is not None and settings.auth is None:
            warn_of_open(settings)  # on loopback too: until now callers needed keys
        self._tasks.start(self._retire(before, gateway))

    async def dry_run(self, settings: Settings) -> None:
        """Builds a gateway and its HTTP layer from these settings, and discards both. Raises what building raises."""
        before = self.gateway
        gateway = self._build_gateway(settings, before)
        try:
            self._generation(gateway)
        finally:
            await gateway.aclose(before)

    async def _retire(self, old: _Generation, successor: Gateway) -> None:
        """Closes a gateway once its requests are answered. Gateways are closed one at a time, in order: a successor
        closes what it shares with its predecessor, and must not do so while that still uses it."""
        async with self._closing:
            remaining = old.gateway.settings.server.request_timeout + GRACE
            while old.in_flight and remaining > 0:
                await self._clock.sleep(0.1)
                remaining -= 0.1
            await old.gateway.aclose(successor)


def _same_settings(one: Settings, other: Settings) -> bool:
    """Whether the settings are equal, including the order of upstreams and models, where the first one counts."""
    orders = [(*each.upstreams, *each.models) for each in (one, other)]
    return one == other and orders[0] == orders[1]


def warn_of_open(settings: Settings) -> None:
    log.warning("no auth.keys: anybody who reaches %s can embed at your expense", settings.server.host)


def _with_header(send: Sender, name: bytes, value: bytes) -> Sender:
    """Wraps `send` to give the response this header, in place of any of that name."""

    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            others = [header for header in message.get("headers", ()) if header[0] != name]
            message["headers"] = [*others, (name, value)]
        await send(message)

    return send_with_header


def create_app(
    settings: Settings,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    stores: Sequence[Store] | None = None,
    clock: Clock | None = None,
    request_log: logs.RequestLog | None = None,
    source: ConfigSource | ParentConfig | None = None,
) -> App:
    """Builds the application. `transport`, `stores` and `clock` replace the real ones; the configuration is reloaded
    from `source` when its file changes or `reload` is called."""
    clock = clock or SystemClock()
    metrics = Metrics()
    if stores is None:
        stores = build.stores(settings.cache, lambda: app.request_timeout(), metrics, clock)  # no app yet
    cache = Tiers(stores, metrics, clock)

    def build_gateway(settings: Settings, before: Gateway | None) -> Gateway:
        return Gateway(settings, cache, metrics, clock, transport, before)

    request_log = request_log or logs.request_log("text")
    request_log.on_drop = metrics.log_dropped.inc
    app = App(settings, build_gateway, request_log, clock, source)
    return app
