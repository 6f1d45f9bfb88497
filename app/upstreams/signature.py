"""bce-auth-v1: requests signed with an access key (cloud.baidu.com/doc/Reference/s/njwvz1yfu). Knows no adapter."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterable, Mapping
from urllib.parse import quote, unquote, urlsplit

from msgspec.structs import replace

from app.clock import Clock
from app.types import Send, WireReply, WireRequest

EXPIRES_IN = 1800
"""Seconds for which a signature is valid."""


class BceSignature:
    """Signs the `host` and all `x-bce-…` headers with an access key."""

    def __init__(self, access_key: str, secret_key: str, clock: Clock) -> None:
        self._access_key, self._secret_key, self._clock = access_key, secret_key, clock

    async def __call__(self, request: WireRequest, send: Send) -> WireReply:
        url = urlsplit(request.url)
        timestamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock.time()))
        headers = {**request.headers, "host": url.netloc.rpartition("@")[2], "x-bce-date": timestamp}
        headers["authorization"] = bce_authorization(
            self._access_key,
            self._secret_key,
            request.method,
            unquote(url.path) or "/",
            request.query,
            headers,
            timestamp=timestamp,
            expires_in=EXPIRES_IN,
            signed=("host", *(name for name in headers if name.startswith("x-bce-"))),
        )
        return await send(replace(request, headers=headers))


def bce_authorization(
    access_key: str,
    secret_key: str,
    method: str,
    path: str,
    query: Mapping[str, str],
    headers: Mapping[str, str],
    *,
    timestamp: str,
    expires_in: int,
    signed: Iterable[str],
) -> str:
    """The `Authorization` header of bce-auth-v1. `path` and `query` must not be percent-encoded yet.

    `signed` holds the lower-case names of the headers to sign. The body is never signed.
    """
    values = {name.lower(): value.strip() for name, value in headers.items()}
    names = sorted(name for name in signed if values.get(name))
    scope = f"bce-auth-v1/{access_key}/{timestamp}/{expires_in}"
    pairs = (f"{_encode(name)}={_encode(value)}" for name, value in query.items() if name.lower() != "authorization")
    canonical = (
        method.upper(),
        quote(path, safe="/"),
        "&".join(sorted(pairs)),
        "\n".join(sorted(f"{_encode(name)}:{_encode(values[name])}" for name in names)),
    )
    signature = _hmac(_hmac(secret_key, scope), "\n".join(canonical))
    return f"{scope}/{';'.join(names)}/{signature}"


def _encode(text: str) -> str:
    return quote(text, safe="")


def _hmac(key: str, message: str) -> str:
    """Lower-case hex. A signing key is used in this form, not as the bytes it encodes."""
    return hmac.new(key.encode(), message.encode(), hashlib.sha256).hexdigest()
