"""Access tokens that replicas share, sealed: only a holder of the upstream's own secret can read or make one."""

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


@dataclass(frozen=True, slots=True)
class SharedToken:
    """Times in seconds since the epoch: replicas have clocks of their own."""

    text: str
    renew_at: float
    expires_at: float


class SealedTokens:
    """The token of one key of one token server. `secret` is the key's own, from which the seal's is derived (HKDF,
    RFC 5869); the seal is Fernet: AES-128-CBC, HMAC-SHA256. Never raises."""

    def __init__(self, store: TokenStore, server: str, key: str, secret: str) -> None:
        self._store = store
        self._name = hashlib.sha256(f"{len(server)}:{server}{key}".encode()).digest()
        derived = HKDF(SHA256(), 32, salt=None, info=_PURPOSE).derive(secret.encode())
        self._seal = Fernet(urlsafe_b64encode(derived))

    async def get(self) -> SharedToken | None:
        """What another replica has put there; what it has not sealed is nothing."""
        sealed = await self._store.get(self._name)
        if sealed is None:
            return None
        try:
            text, renew_at, expires_at = orjson.loads(self._seal.decrypt(sealed))
            return SharedToken(str(text), float(renew_at), float(expires_at))
        except (InvalidToken, TypeError, ValueError):
            return None

    async def put(self, token: SharedToken, lifetime: float) -> None:
        """`lifetime`: seconds until it is of no use."""
        told = orjson.dumps([token.text, token.renew_at, token.expires_at])
        await self._store.put(self._name, self._seal.encrypt(told), lifetime)

    async def claim(self, seconds: float) -> bool:
        """Whether this replica is the one to fetch a new one; also where nobody can tell."""
        return await self._store.claim(self._name, seconds)

    async def release(self) -> None:
        """Lets others fetch before the claim has run out."""
        await self._store.release(self._name)
