"""A caller's key to its name, lane and allowed models. Keys are kept and compared as digests only."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from app.config import AuthSettings
from app.errors import InvalidApiKey, ModelNotAllowed
from app.types import Caller

_BEGINNING = 2
"""Bytes of a digest by which keys are looked up: enough to leave few whole digests to compare with."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who a key belongs to and what it opens. `models` None opens all."""

    caller: Caller
    models: frozenset[str] | None = None

    def may_use(self, *names: str) -> bool:
        return self.models is None or not self.models.isdisjoint(names)

    def check(self, asked: str, own_name: str) -> None:
        """Raises `ModelNotAllowed` unless the key opens the model, by the name asked for or its own."""
        if not self.may_use(asked, own_name):
            raise ModelNotAllowed(f"this API key may not use model '{asked[:200]}'", param="model")


ANONYMOUS = Tenant(Caller())


class Keys:
    """All callers' keys; without any, everybody is let in."""

    def __init__(self, settings: AuthSettings | None) -> None:
        self._tenants: dict[bytes, list[tuple[bytes, Tenant]]] = {}
        """Digest and tenant of each key, by the digest's first bytes: that these match tells nothing of the key."""
        for name, key in settings.keys.items() if settings else ():
            models = frozenset(key.models) if key.models is not None else None
            tenant = Tenant(Caller(name, key.lane, namespace=name if key.cache == "own" else ""), models)
            digest = key.digest()
            self._tenants.setdefault(digest[:_BEGINNING], []).append((digest, tenant))

    @property
    def needed(self) -> bool:
        """Whether a caller must have one."""
        return bool(self._tenants)

    def tenant(self, headers: Mapping[bytes, bytes]) -> Tenant:
        """Raises `InvalidApiKey`. `Authorization: Bearer`, else `api-key`, else `x-api-key`; empty is none."""
        if not self._tenants:
            return ANONYMOUS
        presented = _presented(headers)
        if not presented:
            raise InvalidApiKey("You didn't provide an API key; send Authorization: Bearer YOUR_KEY")
        digest = hashlib.sha256(presented).digest()
        for known, tenant in self._tenants.get(digest[:_BEGINNING], ()):
            if hmac.compare_digest(known, digest):
                return tenant
        raise InvalidApiKey("Incorrect API key provided")


def _presented(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    bearer = token.strip() if scheme.lower() == b"bearer" else b""
    return bearer or headers.get(b"api-key", b"").strip() or headers.get(b"x-api-key", b"").strip()
