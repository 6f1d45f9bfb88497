"""OAuth access tokens: fetched, renewed in time, shared with other replicas, put in the query of each request.

Knows no adapter and no reply but the token server's own; which replies mean a stale token is told by the dialect. A
request is never changed in place: whoever sends it may send it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson
from msgspec.structs import replace

from app.clock import Clock
from app.errors import GatewayError, RateLimited, UpstreamAuth, UpstreamError, UpstreamInvalidResponse
from app.types import Send, WireReply, WireRequest
from app.upstreams import replies
from app.upstreams.sealed import SealedTokens, SharedToken

REFUSED_FOR = 60.0
"""Seconds for which a refused key, or a token server that fails while the old token serves, is not asked again."""
FETCH_CLAIM = 5.0
"""Seconds for which one replica alone fetches a token. Should it die, it holds the others up for no longer."""
POLL_INTERVAL = 0.1
"""Seconds between looks at whether it has come."""


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
        """`shared`: where this and other replicas look before they fetch a token, and leave it."""
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
            if self._token is token:  # where many calls are refused with one token, the first drops it for all
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
        # Remembered, so that a wrong key, or a renewal that fails, is not tried with every call.
        self._refused_until = self._clock.monotonic() + REFUSED_FOR
        self._refusal = error.message if isinstance(error, UpstreamAuth) else ""

    async def _exchange(self, send: Send) -> _Token:
        """The replicas' token, or a new one for all of them."""
        shared = self._shared
        if shared is None:
            return await self._fetch_anew(send)
        until = self._clock.monotonic() + FETCH_CLAIM
        while (known := await self._known(shared)) is None and not await shared.claim(FETCH_CLAIM):
            if self._clock.monotonic() > until:
                break
            await self._clock.sleep(POLL_INTERVAL)  # another replica is fetching one
        if known is not None:
            return known
        try:
            if known := await self._known(shared):  # left between that look and the claim
                return known
            token = await self._fetch_anew(send)
            ahead = self._clock.time() - self._clock.monotonic()
            told = SharedToken(token.text, token.renew_at + ahead, token.expires_at + ahead)
            await shared.put(told, token.expires_at - self._clock.monotonic())
        finally:
            await shared.release()
        return token

    async def _known(self, shared: SealedTokens) -> _Token | None:
        """The token another replica has left, unless it was just refused or is due to be renewed."""
        known = await shared.get()
        if known is None or known.text == self._stale or known.renew_at <= self._clock.time():
            return None
        ahead = self._clock.monotonic() - self._clock.time()
        self._token = _Token(known.text, known.renew_at + ahead, known.expires_at + ahead)
        self._refused_until = -1.0
        return self._token

    async def _fetch_anew(self, send: Send) -> _Token:
        reply = await send(self._ask)
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
                raise replies.make_error(replies.by_status(reply.status, ""), reply) from fault
            raise UpstreamInvalidResponse("the upstream's token server answered something else") from fault
        # An hour early as Baidu's clients do, or a tenth of a shorter life.
        self._token = _Token(text, now + lifetime - min(3600.0, lifetime / 10), now + lifetime)
        self._refused_until = -1.0
        return self._token


def _with_token(request: WireRequest, token: _Token) -> WireRequest:
    return replace(request, query={**request.query, "access_token": token.text})


def _refused(reply: WireReply, body: Mapping[str, object]) -> GatewayError:
    """RFC 6749 5.2's errors are about our key; the rest are the server's own trouble."""
    error, message = str(body.get("error", "")), replies.error_fields(reply).message
    if error == "rate_limit_exceeded":
        return replies.make_error(RateLimited, reply, message)
    if reply.status >= 500 or error in ("unknown_error", "server_error", "temporarily_unavailable"):
        return replies.make_error(UpstreamError, reply, message)
    return replies.make_error(UpstreamAuth, reply, message)
