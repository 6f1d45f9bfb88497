"""Maps an API key to its caller's name, lane and allowed models. Keys are stored and compared only as digests."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from app.config import AuthSettings
from app.errors import InvalidApiKey, ModelNotAllowed, ModelNotFound
from app.types import Caller

_PREFIX_BYTES = 2
"""Bytes of a digest that index the keys: enough to leave few whole digests to compare."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """The owner of a key and the models it may use: all of them if `models` is None."""

    caller: Caller
    models: frozenset[str] | None = None

    def may_use(self, *names: str) -> bool:
        return self.models is None or not self.models.isdisjoint(names)

    def check_known(self, requested: str, served: Collection[str]) -> None:
        """Raises `ModelNotFound` if the key does not list the name and nothing is served under it. Whether an upstream
        has such a model, or is unreachable, is told only to those who may use it."""
        if self.models is not None and requested not in self.models and requested not in served:
            raise ModelNotFound.of(requested)

    def check(self, requested: str, own_name: str) -> None:
        """Raises `ModelNotAllowed` unless the key allows the model, by its requested name or its own."""
        if not self.may_use(requested, own_name):
            raise ModelNotAllowed(f"this API key may not use model '{requested[:200]}'", param="model")


ANONYMOUS = Tenant(Caller())


class Keys:
    """All callers' keys. Without any, every caller is accepted."""

    def __init__(self, settings: AuthSettings | None) -> None:
        self._tenants: dict[bytes, list[tuple[bytes, Tenant]]] = {}
        """Digest and tenant of each key, by the digest's first bytes, whose match reveals nothing about the key."""
        for name, key in settings.keys.items() if settings else ():
            models = frozenset(key.models) if key.models is not None else None
            tenant = Tenant(Caller(name, key.lane, namespace=name if key.cache == "own" else ""), models)
            digest = key.digest()
            self._tenants.setdefault(digest[:_PREFIX_BYTES], []).append((digest, tenant))

    @property
    def needed(self) -> bool:
        """Whether callers must present one."""
        return bool(self._tenants)

    def tenant(self, headers: Mapping[bytes, bytes]) -> Tenant:
        """The tenant of the key in `Authorization: Bearer`, else `api-key`, else `x-api-key`; empty counts as absent.
        Raises `InvalidApiKey`."""
        if not self._tenants:
            return ANONYMOUS
        presented = _presented(headers)
        if not presented:
            raise InvalidApiKey("You didn't provide an API key; send Authorization: Bearer YOUR_KEY")
        digest = hashlib.sha256(presented).digest()
        for stored, tenant in self._tenants.get(digest[:_PREFIX_BYTES], ()):
            if hmac.compare_digest(stored, digest):
                return tenant
        raise InvalidApiKey("Incorrect API key provided")


def _presented(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    bearer = token.strip() if scheme.lower() == b"bearer" else b""
    return bearer or headers.get(b"api-key", b"").strip() or headers.get(b"x-api-key", b"").strip()
