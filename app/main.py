"""The one composition root: settings to a running ASGI application. Everything else is handed what it needs."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence

import httpx
import structlog

from app import logs
from app.api import embeddings, routes
from app.api.auth import Keys
from app.cache import build
from app.cache.tiers import Tiers
from app.clock import Clock, SystemClock
from app.config import Settings
from app.gateway import Gateway
from app.metrics import Metrics
from app.types import Store
from app.upstreams import UPSTREAMS
from app.upstreams.kind import UpstreamKind

log = logging.getLogger(__name__)


class App:
    """The ASGI application: embeddings answered at once, everything else by the framework behind it."""

    def __init__(
        self, gateway: Gateway, settings: Settings, request_log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self.gateway = gateway
        self.on_started: Callable[[], None] | None = None
        """Called once the gateway has started, in the event loop."""
        keys = Keys(settings.auth)
        self._embeddings = embeddings.Embeddings(gateway, keys, settings.server, request_log)
        self._api = routes.build(gateway, keys, self._embeddings, admin=settings.server.metrics_port is None)
        self.admin = None if settings.server.metrics_port is None else routes.build_admin(gateway, self._api)

    async def __call__(self, scope: embeddings.Scope, receive: embeddings.Receive, send: embeddings.Sender) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        matched, model = embeddings.match(scope["path"])
        if matched:
            await self._embeddings(scope, receive, send, model)
        else:
            await self._api(scope, receive, _identified(scope, send))

    async def _lifespan(self, receive: embeddings.Receive, send: embeddings.Sender) -> None:
        """ASGI's start and stop messages around the gateway's."""
        assert (await receive())["type"] == "lifespan.startup"
        try:
            await self.gateway.start()
        except Exception as error:
            log.exception("cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        # What lives from here on lives long: collections need not look at it again (p99, bench/README.md).
        gc.collect()
        gc.freeze()
        if self.on_started:
            self.on_started()
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        self.gateway.draining = True
        await self.gateway.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def _identified(scope: embeddings.Scope, send: embeddings.Sender) -> embeddings.Sender:
    """`send` that puts the request's id on the response."""
    request_id = embeddings.request_id(scope)

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
    kinds: Mapping[str, UpstreamKind] = UPSTREAMS,
    request_log: structlog.typing.FilteringBoundLogger | None = None,
) -> App:
    """The application for these settings. `transport`, `stores` and `clock` replace the real ones."""
    clock = clock or SystemClock()
    metrics = Metrics()
    if stores is None:
        stores = build.stores(settings.cache, metrics, clock)
    cache = Tiers(stores, metrics, clock)
    gateway = Gateway(settings, kinds, cache, metrics, clock, transport)
    return App(gateway, settings, request_log or logs.request_log("text"))
