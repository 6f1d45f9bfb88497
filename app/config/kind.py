"""What a dialect's module hands to the rest: its settings, its adapter, its credentials, its models. The configuration
knows no dialect but by this."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from app.catalog import ANY, Model
from app.clock import Clock
from app.config.settings import UpstreamSettings
from app.types import Adapter, Auth, Send, TokenStore


def unlisted_model(name: str) -> Model:
    """A model nothing is known of: few inputs a call, and whatever length the upstream takes."""
    return Model(name, dimension_choices=ANY, max_batch=10)


@dataclass(frozen=True, slots=True)
class UpstreamKind:
    """One value of `type:` in the configuration. All functions take this type's own settings."""

    name: str
    settings: type[UpstreamSettings]
    adapter: Callable[[Any], Adapter]
    """The dialect spoken with these settings (a type may have modes)."""
    auth: Callable[[Any, Clock, TokenStore | None], Auth]
    """With where tokens may be shared with other replicas, for types that have some."""
    models: Callable[[Any], Mapping[str, Model]]
    """What is known beforehand, from the catalogue."""
    discover: Callable[[Any, Send], Awaitable[Sequence[Model] | None]] | None = None
    """Asks the upstream for its models, None where it has no list; raises `GatewayError`. `Send` is already
    authorised."""
    environment: Callable[[Mapping[str, str]], dict[str, Any] | None] = lambda _: None
    """Settings (as in YAML) from vendor variables such as `X_API_KEY`, or None when they are not set."""
    switched_on_by: str = ""
    """The variables `environment` looks at, in words for a reader; the names stand in capitals."""
    transport: Callable[[Any], httpx.AsyncBaseTransport | None] = lambda _: None
    """A transport of its own, for an upstream inside this process."""
    default_address: tuple[str, int] | None = None
    """Where a server of this type listens when nobody says otherwise: without a config file it is looked for there."""
    built_in: bool = False
    """Serves when nothing else is configured."""
    unlisted_model: Callable[[str], Model] = unlisted_model
    """Facts to go by for a model that is configured but not known."""

    def facts(self, settings: UpstreamSettings, model: str) -> Model:
        """What is known of a model beforehand."""
        return self.models(settings).get(model) or self.unlisted_model(model)

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the variables `environment` looks at."""
        return tuple(re.findall(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+", self.switched_on_by))
