"""A configured upstream: its client, credentials, dialect and known models."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping

import httpx
from msgspec.structs import replace
from pydantic import SecretStr

from app.catalog import Model
from app.clock import Clock
from app.config import UpstreamKind, UpstreamSettings
from app.errors import (
    GatewayError,
    InvalidRequest,
    Overloaded,
    UpstreamError,
    UpstreamInvalidResponse,
    UpstreamMisconfigured,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from app.types import Send, TokenStore, WireReply, WireRequest
from app.upstreams.client import Client
from app.upstreams.network import NetworkEngine, basic_credentials
from app.upstreams.redact import Redactor

log = logging.getLogger(__name__)

LIST_TTL = 10.0
"""Seconds before a list of models is fetched again, however many unknown models are requested."""
LIST_RETRY = 1.0
"""The same for an upstream that was unavailable."""
LIST_TIMEOUT = 5.0
"""Seconds callers wait for a list of models before they go on with what is known."""
FAILED_LIST_TIMEOUT = 0.2
"""The same if the last list failed or timed out: it may never work, while embeddings do."""
MAX_LIST = 16 * 2**20
"""Bytes of a reply about models, at most."""

_LOAD_SETTINGS = ("timeout", "connect_timeout", "max_concurrency", "requests_per_minute", "tokens_per_minute")
"""Settings that limit an upstream's calls in time and number, and change neither which server answers nor what."""


class Upstream:
    """Holds a connection pool: close it."""

    def __init__(
        self,
        name: str,
        settings: UpstreamSettings,
        kind: UpstreamKind,
        clock: Clock,
        transport: httpx.AsyncBaseTransport | None = None,
        tokens: TokenStore | None = None,
    ) -> None:
        self.name, self.settings, self.kind = name, settings, kind
        self._clock = clock
        self.redact = Redactor(_secrets(settings))
        engine = kind.transport(settings) or transport or _network(settings)
        self._client = Client(engine, timeout=settings.timeout, headers=settings.headers)
        self.send: Send = self._client.send
        """One exchange, without credentials."""
        self.adapter = kind.adapter(settings)
        self.auth = kind.auth(settings, clock, tokens)
        self.models: dict[str, Model] = dict(kind.models(settings))
        self.discovers = kind.discover is not None and not self.models
        self.trouble: GatewayError | None = None
        """Why its models could not be listed, redacted; None if they could."""
        self.lists_models = True
        """Whether it has a list of models. A server without one serves the models that are configured, or `assumed`."""
        self._assumed = kind.assumed(settings)
        self._empty = False
        self._listed_at: float | None = None
        self._discovery: asyncio.Task[None] | None = None

    @property
    def unavailable(self) -> bool:
        """Whether its models could not be listed because it, or what is in front of it, is unreachable, unavailable or
        failing (a 500 or 502), or because the gateway had no room for a connection."""
        if self.trouble is None:  # nearly always, and every request checks
            return False
        unreachable = isinstance(self.trouble, UpstreamUnreachable | UpstreamTimeout | Overloaded)
        return unreachable or type(self.trouble) is UpstreamError

    @property
    def assumed(self) -> Mapping[str, Model]:
        """The models it is assumed to have if none is configured for it, because it has no list."""
        return {} if self.lists_models else self._assumed

    def model(self, name: str) -> Model:
        """Facts about a configured model, whether or not the upstream is known to have it."""
        return self.models.get(name) or self.kind.unlisted_model(name)

    def equivalent_to(self, predecessor: Upstream | None) -> bool:
        """Whether it gives the same answers as its predecessor: only `_LOAD_SETTINGS` differ."""
        if predecessor is None or type(self.settings) is not type(predecessor.settings):
            return False
        theirs = {each: getattr(predecessor.settings, each) for each in _LOAD_SETTINGS}
        return self.settings.model_copy(update=theirs) == predecessor.settings

    def inherit_models(self, predecessor: Upstream) -> None:
        """Starts with the predecessor's models if that is the same server: its list may not be available right now."""
        if self.discovers and (self.kind, self.settings.base_url) == (predecessor.kind, predecessor.settings.base_url):
            self.models, self.lists_models = predecessor.models, predecessor.lists_models

    async def discover(self) -> None:
        """Asks the upstream for its models, unless it was just asked. Concurrent callers wait for the same answer, for
        a bounded time, and one that gives up does not cancel it for the others. A changed list is a new `models`
        object."""
        if not self.discovers:
            return
        now = self._clock.monotonic()
        if self._discovery is None:
            if self._listed_at is not None and now - self._listed_at < (LIST_RETRY if self.unavailable else LIST_TTL):
                return
            self._listed_at = now
            self._discovery = asyncio.create_task(self._list_models())
            self._discovery.add_done_callback(self._discovery_done)
        assert self._listed_at is not None
        failed = self.unavailable and not isinstance(self.trouble, UpstreamUnreachable)
        timeout = FAILED_LIST_TIMEOUT if failed else LIST_TIMEOUT
        _, pending = await asyncio.wait([self._discovery], timeout=max(0.0, self._listed_at + timeout - now))
        if pending and self.trouble is None:
            self.trouble = UpstreamTimeout("it does not answer")

    def _discovery_done(self, _task: asyncio.Task[None]) -> None:
        self._discovery, self._listed_at = None, self._clock.monotonic()

    async def _list_models(self) -> None:
        assert self.kind.discover is not None
        try:
            found = await self.kind.discover(self.settings, self._ask)
        except GatewayError as error:
            error.message = self.redact(error.message)
            # No caller sent anything that it could refuse here.
            self._cannot_list(UpstreamMisconfigured(error.message) if isinstance(error, InvalidRequest) else error)
            return
        except Exception as bug:  # ours: otherwise nobody would hear of it
            message = f"its list of models could not be read ({type(bug).__name__})"
            self._cannot_list(UpstreamInvalidResponse(message), bug)
            return
        if found is None and self.models:
            self._cannot_list(UpstreamMisconfigured("its list of models has disappeared"))  # most likely temporarily
            return
        self.trouble = None
        listed, self.lists_models = self.lists_models, found is not None
        if found is None and listed:
            self._tell_of_no_list()
        empty = found is not None and not found
        if empty and not self._empty:
            log.warning("upstream %s has no model for embeddings: only what is configured is served", self.name)
        self._empty = empty
        models = {model.name: model for model in found or ()}
        if models != self.models or listed != self.lists_models:
            self.models = models

    def _tell_of_no_list(self) -> None:
        served = "only what is configured is served"
        if self._assumed:
            served += f", or if that is nothing, {', '.join(self._assumed)}, unless a reply names another model"
        message = "upstream %s has no list of models at its base_url, which ends in /v1 as a rule: %s"
        log.warning(message, self.name, served)

    async def _ask(self, request: WireRequest) -> WireReply:
        return await self.auth(replace(request, max_reply=MAX_LIST), self.send)

    def _cannot_list(self, error: GatewayError, bug: Exception | None = None) -> None:
        """Keeps the error and logs it when it is new: lists are fetched every minute."""
        if self.trouble is None or error.message != self.trouble.message:
            level = logging.ERROR if bug else logging.WARNING
            log.log(level, "upstream %s: cannot list its models: %s", self.name, error, exc_info=bug)
        self.trouble = error

    async def aclose(self) -> None:
        if self._discovery is not None:
            self._discovery.cancel()
            await asyncio.gather(self._discovery, return_exceptions=True)
        await self._client.aclose()


def _network(settings: UpstreamSettings) -> NetworkEngine:
    proxy = settings.proxy.get_secret_value() if settings.proxy else None
    return NetworkEngine(connect_timeout=settings.connect_timeout, proxy=proxy)


def _secrets(settings: UpstreamSettings) -> Iterator[str]:
    """Every secret in an upstream's settings, whatever the field, and in the form it is sent in."""
    for name in type(settings).model_fields:
        yield from _secrets_in(getattr(settings, name))
    if settings.proxy is not None:
        url = settings.proxy.get_secret_value()
        yield basic_credentials(url)
        yield httpx.URL(url).password


def _secrets_in(value: object) -> Iterator[str]:
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _secrets_in(each)
    elif isinstance(value, Mapping):  # headers: `Bearer …`, `Token …`, or a key alone
        words = (word for each in value.values() if isinstance(each, str) for word in (each, *each.split()))
        yield from (word for word in words if len(word) >= 8)
