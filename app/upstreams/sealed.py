"""Sealed access tokens shared by replicas: only a holder of the upstream's secret can read or create one."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64encode
from dataclasses import dataclass

import orjson
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from app.types import TokenStore

_PURPOSE = b"embedding-gateway access token 1"


@dataclass(frozen=True, slots=True, eq=False)
class Token:
    """Times are seconds since the epoch where replicas share it, because each has its own monotonic clock. Compared by
    identity: a server may issue the same text twice."""

    text: str
    renew_at: float
    expires_at: float

    def moved(self, seconds: float) -> Token:
        """The token with its times on a clock that is so many seconds ahead."""
        return Token(self.text, self.renew_at + seconds, self.expires_at + seconds)


class SealedTokens:
    """The token for one key at one token server. The sealing key is derived from the key's `secret` (HKDF, RFC 5869);
    the seal is Fernet: AES-128-CBC, HMAC-SHA256. Never raises."""

    def __init__(self, store: TokenStore, server: str, key: str, secret: str) -> None:
        self._store = store
        self._name = hashlib.sha256(f"{len(server)}:{server}{key}".encode()).digest()
        derived = HKDF(SHA256(), 32, salt=None, info=_PURPOSE).derive(secret.encode())
        self._seal = Fernet(urlsafe_b64encode(derived))

    async def get(self) -> Token | None:
        """The shared token; None if there is none, or its seal is not ours."""
        sealed = await self._store.get(self._name)
        if sealed is None:
            return None
        try:
            text, renew_at, expires_at = orjson.loads(self._seal.decrypt(sealed))
            return Token(str(text), float(renew_at), float(expires_at))
        except (InvalidToken, TypeError, ValueError):
            return None

    async def put(self, token: Token, lifetime: float) -> None:
        """`lifetime`: seconds until the token expires."""
        payload = orjson.dumps([token.text, token.renew_at, token.expires_at])
        await self._store.put(self._name, self._seal.encrypt(payload), lifetime)

    async def claim(self, seconds: float) -> bool:
        """Whether this replica should fetch a new token; true also if the store does not answer."""
        return await self._store.claim(self._name, seconds)

    async def release(self) -> None:
        """Lets other replicas fetch before the claim expires."""
        await self._store.release(self._name)
