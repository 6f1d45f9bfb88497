"""One upstream, connected: its client, credentials, dialect and the models it is known to have."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping

import httpx
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
from app.types import Send, TokenStore
from app.upstreams.client import Client
from app.upstreams.network import NetworkEngine, basic_credentials
from app.upstreams.redact import Redactor

log = logging.getLogger(__name__)

LIST_TTL = 10.0
"""Seconds for which a list of models is not asked for again, however many unknown names are asked for."""
LIST_RETRY = 1.0
"""The same, where the upstream was not there to be asked."""
LIST_TIMEOUT = 5.0
"""Seconds for which callers wait for a list of models; then they go on with what is known."""
FAILED_LIST_TIMEOUT = 0.2
"""The same, where the list failed or did not come in time before: it may do so for good while embeddings work."""

_PATIENCE = ("timeout", "connect_timeout", "max_concurrency", "requests_per_minute", "tokens_per_minute")
"""Settings that say how much and how long an upstream is asked, and alter neither who answers nor what."""


class Upstream:
    """A configured upstream. Holds a connection pool: close it."""

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
        """One exchange without credentials."""
        self.adapter = kind.adapter(settings)
        self.auth = kind.auth(settings, clock, tokens)
        self.models: dict[str, Model] = dict(kind.models(settings))
        self.discovers = kind.discover is not None and not self.models
        self.trouble: GatewayError | None = None
        """Why its models could not be listed, if they could not; free of secrets."""
        self.lists_models = True
        """Whether it has a list of models: some servers have none, and serve what an operator names."""
        self._empty = False
        self._discovered_at: float | None = None
        self._asking: asyncio.Task[None] | None = None

    @property
    def unavailable(self) -> bool:
        """Whether its models could not be listed because it is not there, or what stands in front of it says so, or it
        fails altogether (a 500 or 502), or there was no room here for a connection."""
        if self.trouble is None:  # nearly always, and asked for every request
            return False
        gone = isinstance(self.trouble, UpstreamUnreachable | UpstreamTimeout | Overloaded)
        return gone or type(self.trouble) is UpstreamError

    def model(self, name: str) -> Model:
        """Facts about a model the operator names, whether or not the upstream is known to have it."""
        return self.models.get(name) or self.kind.unlisted_model(name)

    def equivalent_to(self, before: Upstream | None) -> bool:
        """Whether this one gives what the other one gave: their settings differ in nothing but `_PATIENCE`."""
        if before is None or type(self.settings) is not type(before.settings):
            return False
        same = {each: getattr(before.settings, each) for each in _PATIENCE}
        return self.settings.model_copy(update=same) == before.settings

    def inherit_models(self, before: Upstream) -> None:
        """Takes the models of the one in whose place it comes, if that is the same server, until it has been asked: its
        list may not be to be had at this very moment."""
        if self.discovers and (self.kind, self.settings.base_url) == (before.kind, before.settings.base_url):
            self.models, self.lists_models = before.models, before.lists_models

    async def discover(self) -> None:
        """Asks the upstream for its models, unless it was just asked. Callers that come meanwhile wait for the same
        answer, none of them for long, and one that leaves does not cancel it for the others. `models` is another
        mapping object once it has changed."""
        if not self.discovers:
            return
        now = self._clock.monotonic()
        if self._asking is None:
            if self._discovered_at is not None and now - self._discovered_at < (
                LIST_RETRY if self.unavailable else LIST_TTL
            ):
                return
            self._discovered_at = now
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(self._asked)
        assert self._discovered_at is not None
        failed = self.unavailable and not isinstance(self.trouble, UpstreamUnreachable)
        patience = FAILED_LIST_TIMEOUT if failed else LIST_TIMEOUT
        _, hanging = await asyncio.wait([self._asking], timeout=max(0.0, self._discovered_at + patience - now))
        if hanging and self.trouble is None:
            self.trouble = UpstreamTimeout("it does not answer")

    def _asked(self, _task: asyncio.Task[None]) -> None:
        self._asking, self._discovered_at = None, self._clock.monotonic()

    async def _ask(self) -> None:
        assert self.kind.discover is not None
        try:
            found = await self.kind.discover(self.settings, lambda request: self.auth(request, self.send))
        except GatewayError as error:
            error.message = self.redact(error.message)
            # What it refuses here is no caller's input.
            self._cannot_list(UpstreamMisconfigured(error.message) if isinstance(error, InvalidRequest) else error)
            return
        except Exception as bug:  # of ours: nobody else would hear of it
            told = f"its list of models could not be read ({type(bug).__name__})"
            self._cannot_list(UpstreamInvalidResponse(told), bug)
            return
        if found is None and self.models:
            self._cannot_list(UpstreamMisconfigured("its list of models is gone"))  # for the moment, most likely
            return
        self.trouble = None
        if found is None and self.lists_models:
            told = "upstream %s has no list of models at its base_url, which ends in /v1 as a rule: "
            log.warning(told + "only what is configured is served", self.name)
        self.lists_models = found is not None
        empty = found is not None and not found
        if empty and not self._empty:
            log.warning("upstream %s has no model for embeddings: only what is configured is served", self.name)
        self._empty = empty
        models = {model.name: model for model in found or ()}
        if models != self.models:
            self.models = models

    def _cannot_list(self, why: GatewayError, bug: Exception | None = None) -> None:
        """Remembers why, and logs it once: lists are asked for every minute."""
        if self.trouble is None or why.message != self.trouble.message:
            level = logging.ERROR if bug else logging.WARNING
            log.log(level, "upstream %s: cannot list its models: %s", self.name, why, exc_info=bug)
        self.trouble = why

    async def aclose(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await self._client.aclose()


def _network(settings: UpstreamSettings) -> NetworkEngine:
    proxy = settings.proxy.get_secret_value() if settings.proxy else None
    return NetworkEngine(connect_timeout=settings.connect_timeout, proxy=proxy)


def _secrets(settings: UpstreamSettings) -> Iterator[str]:
    """Every secret in an upstream's settings, wherever its type put it, and as it is sent."""
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
