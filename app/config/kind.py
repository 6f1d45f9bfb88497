"""What a dialect's module provides to the rest: its settings, adapter, credentials and models. The configuration knows
dialects only through this."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from app.catalog import ANY, CATALOG, Model
from app.clock import Clock
from app.config.settings import UpstreamSettings
from app.types import Adapter, Auth, Send, TokenStore


def unlisted_model(name: str) -> Model:
    """A model of which nothing is known: few inputs per call, and whatever length the upstream takes."""
    return Model(name, dimension_choices=ANY, max_batch=10)


@dataclass(frozen=True, slots=True)
class VendorVariable:
    """An environment variable of the vendor's own tools, such as `X_API_KEY`. Empty counts as unset."""

    setting: str
    """The setting it gives."""
    name: str
    alternative: str = ""
    """Read if `name` is unset."""
    optional: bool = False
    """Whether the type is switched on without it."""
    read: Callable[[str], str] = str
    """Its text as it would stand in YAML."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.alternative) if self.alternative else (self.name,)

    def __str__(self) -> str:
        return " or ".join(self.names)

    def value(self, environ: Mapping[str, str]) -> str:
        """The setting's value; empty if unset."""
        return self.read(next(filter(None, map(environ.get, self.names)), ""))


@dataclass(frozen=True, slots=True)
class UpstreamKind:
    """One value of `type:` in the configuration. The functions take this type's own settings."""

    name: str
    settings: type[UpstreamSettings]
    adapter: Callable[[Any], Adapter]
    """The adapter for these settings (a type may have modes)."""
    auth: Callable[[Any, Clock, TokenStore | None], Auth]
    """Also takes the store in which replicas share access tokens, for types that use them."""
    models: Callable[[Any], Mapping[str, Model]] = lambda settings: CATALOG.get(settings.type, {})
    """The models known beforehand: by default, all that the catalogue has under the type's name."""
    discover: Callable[[Any, Send], Awaitable[Sequence[Model] | None]] | None = None
    """Asks the upstream for its models; None if it has no list. Raises `GatewayError`. `Send` adds the credentials."""
    assumed: Callable[[Any], Mapping[str, Model]] = lambda _: {}
    """The models that a server without a list is assumed to have as long as none is configured for it."""
    vendor_variables: Sequence[VendorVariable] = ()
    """What switches the type on when no file names an upstream: all of them but the optional ones."""
    transport: Callable[[Any], httpx.AsyncBaseTransport | None] = lambda _: None
    """The type's own transport, for an upstream inside this process."""
    default_address: tuple[str, int] | None = None
    """Where a server of this type listens by default: without configured upstreams it is looked for there."""
    built_in: bool = False
    """Serves when nothing else is configured."""
    unlisted_model: Callable[[str], Model] = unlisted_model
    """The facts assumed for a model that is configured but not known."""

    def facts(self, settings: UpstreamSettings, model: str) -> Model:
        """The facts known of a model beforehand."""
        return self.models(settings).get(model) or self.unlisted_model(model)

    def environment(self, environ: Mapping[str, str]) -> dict[str, Any] | None:
        """Settings (as in YAML) from the vendor's variables; None if they do not switch the type on."""
        found = {each.setting: value for each in self.vendor_variables if (value := each.value(environ))}
        needed = [each.setting for each in self.vendor_variables if not each.optional]
        return {"type": self.name, **found} if needed and found.keys() >= set(needed) else None

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of the variables `environment` reads."""
        return tuple(name for each in self.vendor_variables for name in each.names)

    @property
    def switched_on_by(self) -> str:
        """The same in prose, for users."""
        needed = " with ".join(str(each) for each in self.vendor_variables if not each.optional)
        return needed + "".join(f" ({each})" for each in self.vendor_variables if each.optional)
