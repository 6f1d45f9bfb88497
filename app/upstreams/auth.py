"""Credentials put on requests: API keys in turn, OAuth access tokens, and Baidu's request signature.

Knows no adapter and no reply but the token server's own; which replies mean a stale token is told by the
dialect. A request is never changed in place: whoever sends it may send it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote, unquote, urlsplit

import orjson
from msgspec.structs import replace

from app.config import UpstreamSettings
from app.errors import GatewayError, QuotaExhausted, RateLimited, UpstreamAuth, UpstreamError, UpstreamInvalidResponse
from app.types import Auth, Send, WireReply, WireRequest
from app.upstreams import replies
from app.upstreams.kind import Clock
from app.upstreams.sealed import SealedTokens, SharedToken

log = logging.getLogger(__name__)

Judge: TypeAlias = Callable[[WireReply], GatewayError | None]

KEY_REFUSED_FOR = 600.0
"""Seconds for which one of several keys that is refused or used up is not tried."""
REFUSED_FOR = 60.0
"""Seconds for which a refused key, or a token server that fails, is not asked again."""
CLAIM = 5.0
"""Seconds for which one replica has the fetching of a token to itself. One that dies holds the others up no longer."""
LOOK = 0.1
"""Seconds between looks at whether it has come."""


def keys(settings: UpstreamSettings) -> list[str]:
    """The keys to take turns; none for an upstream without."""
    secrets = (settings.api_key,) if settings.api_key is not None else settings.api_keys
    return [secret.get_secret_value() for secret in secrets]


def need_key(settings: UpstreamSettings, variable: str) -> None:
    """Raises `ValueError` for settings without a key, saying what to set."""
    if not keys(settings):
        raise ValueError(f'api_key: needed; set it here, for instance to "${{{variable}}}"')


def bearer(keys: Sequence[str], judge: Judge, clock: Clock) -> Auth:
    """`Authorization: Bearer …`, or nothing where there is no key."""
    return HeaderKey("authorization", [f"Bearer {key}" for key in keys], judge, clock) if keys else NoAuth()


class NoAuth:
    """For servers that ask for no key."""

    async def __call__(self, request: WireRequest, send: Send) -> WireReply:
        return await send(request)


class HeaderKey:
    """A key in a header. Several take turns and are judged one by one: a key that is refused, used up or at
    its rate leaves the rotation alone, and the call goes out again at once with the next.

    `judge` is the dialect's `parse_error`.
    """

    def __init__(self, header: str, values: Iterable[str], judge: Judge, clock: Clock) -> None:
        self._header = header
        self._values = list(values)
        self._judge, self._clock = judge, clock
        self._out_until = [0.0] * len(self._values)
        self._turn = 0

    async def __call__(self, request: WireRequest, send: Send) -> WireReply:
        if len(self._values) == 1:
            return await send(self._with(request, 0))
        tried: set[int] = set()
        while True:
            key = self._next(tried)
            reply = await send(self._with(request, key))
            tried.add(key)
            error = self._judge(reply)
            if not isinstance(error, UpstreamAuth | RateLimited | QuotaExhausted):
                return reply
            self._leave_out(key, error, request)
            if len(tried) == len(self._values) or not self._fresh(tried):
                return reply

    def _leave_out(self, key: int, error: GatewayError, request: WireRequest) -> None:
        """A rate passes soon. A refusal or a quota that is used up does not, and while other keys serve nobody else
        tells."""
        now, seconds = self._clock.monotonic(), KEY_REFUSED_FOR
        if isinstance(error, RateLimited):
            # An upstream's word may be a date that was taken for a number of seconds.
            seconds = min(seconds, 1.0 if error.retry_after is None else error.retry_after)
        elif self._out_until[key] <= now:
            log.warning(
                "%s: key %d of %d is not used for %g s: %s",
                *(urlsplit(request.url).hostname, key + 1, len(self._values), seconds, error.code),
            )
        self._out_until[key] = now + seconds

    def _with(self, request: WireRequest, key: int) -> WireRequest:
        return replace(request, headers={**request.headers, self._header: self._values[key]})

    def _fresh(self, tried: set[int]) -> bool:
        """Whether a key is left that is neither tried nor out."""
        now = self._clock.monotonic()
        return any(until <= now and key not in tried for key, until in enumerate(self._out_until))

    def _next(self, tried: set[int]) -> int:
        """The next in turn that is in; if all are out, the one that comes back first."""
        now, count = self._clock.monotonic(), len(self._values)
        turns = [(self._turn + step) % count for step in range(count)]
        left = [key for key in turns if key not in tried]
        key = next((key for key in left if self._out_until[key] <= now), None)
        if key is None:
            key = min(left, key=lambda each: self._out_until[each])
        self._turn = key + 1
        return key


# --- access tokens ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Token:
    """Told apart by identity: a server may give the same text twice."""

    text: str
    renew_at: float
    expires_at: float


class AccessToken:
    """OAuth client credentials (RFC 6749, 4.4), the token in the query of each request.

    Fetched once for any number of calls, renewed while the old one still serves, and replaced once when a
    reply says that it is stale. Raises `UpstreamAuth` for a refused key, and other `GatewayError`s for a
    token server in trouble.
    """

    def __init__(
        self,
        ask: WireRequest,
        is_stale: Callable[[WireReply], bool],
        clock: Clock,
        shared: SealedTokens | None = None,
    ) -> None:
        """`shared`: where other replicas look before they fetch one, and this one."""
        self._ask = ask
        self._is_stale = is_stale
        self._clock = clock
        self._shared = shared
        self._stale = ""
        """The text of the last token that was refused."""
        self._token: _Token | None = None
        self._fetching: asyncio.Task[_Token] | None = None
        self._refusal = ""
        self._refused_until = -1.0

    async def __call__(self, request: WireRequest, send: Send) -> WireReply:
        # A token that another replica has left may be stale as well; the one after that is new.
        for _ in range(2 if self._shared else 1):
            token = await self._current(send)
            reply = await send(_with_token(request, token))
            if not self._is_stale(reply):
                return reply
            if self._token is token:  # of many calls refused with one token, the first drops it for all
                self._token, self._stale = None, token.text
        return await send(_with_token(request, await self._current(send)))

    async def _current(self, send: Send) -> _Token:
        now = self._clock.monotonic()
        token = self._token
        if token is not None and now < token.renew_at:
            return token
        if now < self._refused_until:
            if token is not None and now < token.expires_at:
                return token
            if self._refusal:
                raise UpstreamAuth(self._refusal)
        fetching = self._fetch(send)
        if token is not None and now < token.expires_at:
            return token
        # In a task of its own, so that a caller who leaves takes the token from nobody.
        return await asyncio.shield(fetching)

    def _fetch(self, send: Send) -> asyncio.Task[_Token]:
        """The fetch under way, or a new one."""
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._exchange(send))
            self._fetching.add_done_callback(self._fetched)
        return self._fetching

    def _fetched(self, task: asyncio.Task[_Token]) -> None:
        self._fetching = None
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        # Remembered, so that neither a wrong key nor a renewal that fails is tried with every call.
        self._refused_until = self._clock.monotonic() + REFUSED_FOR
        self._refusal = error.message if isinstance(error, UpstreamAuth) else ""

    async def _exchange(self, send: Send) -> _Token:
        """The replicas' token, or a new one for all of them."""
        shared = self._shared
        if shared is None:
            return await self._fetch_anew(send)
        patience = self._clock.monotonic() + CLAIM
        while (known := await self._known(shared)) is None and not await shared.claim(CLAIM):
            if self._clock.monotonic() > patience:
                break
            await self._clock.sleep(LOOK)  # another replica is fetching one
        if known is not None:
            return known
        try:
            token = await self._fetch_anew(send)
            ahead = self._clock.time() - self._clock.monotonic()
            told = SharedToken(token.text, token.renew_at + ahead, token.expires_at + ahead)
            await shared.put(told, token.expires_at - self._clock.monotonic())
        finally:
            await shared.release()
        return token

    async def _known(self, shared: SealedTokens) -> _Token | None:
        """What another replica has left, if it is neither what was just refused nor due to be renewed."""
        known = await shared.get()
        if known is None or known.text == self._stale or known.renew_at <= self._clock.time():
            return None
        ahead = self._clock.monotonic() - self._clock.time()
        self._token = _Token(known.text, known.renew_at + ahead, known.expires_at + ahead)
        self._refused_until = -1.0
        return self._token

    async def _fetch_anew(self, send: Send) -> _Token:
        reply = await send(replace(self._ask, headers=dict(self._ask.headers), query=dict(self._ask.query)))
        now = self._clock.monotonic()
        try:
            body = orjson.loads(reply.body)
            if not isinstance(body, dict):
                raise TypeError("no object")
            # Baidu's SDKs ignore the status and look for `error`; so do we.
            if reply.status >= 400 or body.get("error"):
                raise _refused(reply, body)
            text, lifetime = body["access_token"], float(body["expires_in"])
            if not (isinstance(text, str) and text and lifetime > 0):
                raise ValueError("no token")
        except (KeyError, TypeError, ValueError) as fault:
            if reply.status >= 300:
                raise replies.failure(replies.by_status(reply.status, ""), reply) from fault
            raise UpstreamInvalidResponse("the upstream's token server answered something else") from fault
        # An hour early as Baidu's clients do, or a tenth of a shorter life.
        self._token = _Token(text, now + lifetime - min(3600.0, lifetime / 10), now + lifetime)
        self._refused_until = -1.0
        return self._token


def _with_token(request: WireRequest, token: _Token) -> WireRequest:
    query = {**request.query, "access_token": token.text}
    return replace(request, headers=dict(request.headers), query=query)


def _refused(reply: WireReply, body: Mapping[str, object]) -> GatewayError:
    """RFC 6749 5.2's errors are about our key; the rest are the server's own trouble."""
    error, message = str(body.get("error", "")), replies.said(reply).message
    if error == "rate_limit_exceeded":
        return replies.failure(RateLimited, reply, message)
    if reply.status >= 500 or error in ("unknown_error", "server_error", "temporarily_unavailable"):
        return replies.failure(UpstreamError, reply, message)
    return replies.failure(UpstreamAuth, reply, message)


# --- bce-auth-v1 ------------------------------------------------------------------------------------

_SIGNED_BY_DEFAULT = frozenset({"host", "content-length", "content-type", "content-md5"})


class BceSignature:
    """Signs `host` and `x-bce-date` with an access key (cloud.baidu.com/doc/Reference/s/njwvz1yfu)."""

    def __init__(self, access_key: str, secret_key: str, clock: Clock, expires_in: int = 1800) -> None:
        self._access_key, self._secret_key = access_key, secret_key
        self._clock = clock
        self._expires_in = expires_in

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
            expires_in=self._expires_in,
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
    signed: Iterable[str] | None = None,
) -> str:
    """The `Authorization` header of bce-auth-v1; `path` and `query` are not percent-encoded yet.

    `signed` names the headers to sign; None takes the vendor's default set. The body is never signed.
    """
    values = {name.lower(): value.strip() for name, value in headers.items()}
    if signed is None:
        signed = (name for name in values if name in _SIGNED_BY_DEFAULT or name.startswith("x-bce-"))
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
    """Lower-case hex. The signing key is used as this text, not as the bytes it stands for."""
    return hmac.new(key.encode(), message.encode(), hashlib.sha256).hexdigest()
