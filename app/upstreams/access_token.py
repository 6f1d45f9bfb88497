"""OAuth access tokens: fetched, renewed in time, shared with other replicas, added to each request's query.

Knows no adapter and no reply but the token server's; the dialect says which replies mean a stale token. Requests are
never changed in place: the sender may send them again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping

import orjson
from msgspec.structs import replace

from app.clock import Clock
from app.errors import GatewayError, RateLimited, UpstreamAuth, UpstreamError, UpstreamInvalidResponse
from app.types import Send, WireReply, WireRequest
from app.upstreams import replies
from app.upstreams.sealed import SealedTokens, Token

RETRY_DELAY = 60.0
"""Seconds before a refused key is tried again, or a token server that failed while the old token still served."""
FETCH_CLAIM = 5.0
"""Seconds for which one replica alone may fetch a token: the longest it delays the others if it dies."""
POLL_INTERVAL = 0.1
"""Seconds between checks for the token that another replica is fetching."""


class AccessToken:
    """OAuth client credentials (RFC 6749, 4.4), with the token in each request's query.

    The token is fetched once for any number of calls, renewed while the old one still serves, and replaced once when
    a reply says that it is stale. Raises `UpstreamAuth` for a refused key, and other `GatewayError`s when the token
    server fails.
    """

    def __init__(
        self,
        token_request: WireRequest,
        is_stale: Callable[[WireReply], bool],
        clock: Clock,
        shared: SealedTokens | None = None,
    ) -> None:
        """`shared`: where replicas look for a token before they fetch one, and put the one they fetched."""
        self._token_request = token_request
        self._is_stale = is_stale
        self._clock = clock
        self._shared = shared
        self._stale_text = ""
        """The last token that was refused."""
        self._token: Token | None = None
        self._fetch: asyncio.Task[Token] | None = None
        self._refusal = ""
        self._retry_at = -1.0

    async def __call__(self, request: WireRequest, send: Send) -> WireReply:
        # A token from another replica may be stale too; the next one is fresh.
        for _ in range(2 if self._shared else 1):
            token = await self._current(send)
            reply = await send(_with_token(request, token))
            if not self._is_stale(reply):
                return reply
            if self._token is token:  # the first of many calls refused with one token drops it for all
                self._token, self._stale_text = None, token.text
        return await send(_with_token(request, await self._current(send)))

    async def _current(self, send: Send) -> Token:
        now = self._clock.monotonic()
        token = self._token
        if token is not None and now < token.renew_at:
            return token
        if now < self._retry_at:
            if token is not None and now < token.expires_at:
                return token
            if self._refusal:
                raise UpstreamAuth(self._refusal)
        fetching = self._ensure_fetch(send)
        if token is not None and now < token.expires_at:
            return token
        # In its own task, so that a caller that gives up does not cancel it for the others.
        return await asyncio.shield(fetching)

    def _ensure_fetch(self, send: Send) -> asyncio.Task[Token]:
        """The fetch in progress, or a new one."""
        if self._fetch is None:
            self._fetch = asyncio.create_task(self._obtain(send))
            self._fetch.add_done_callback(self._fetch_done)
        return self._fetch

    def _fetch_done(self, task: asyncio.Task[Token]) -> None:
        self._fetch = None
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        # So that a wrong key, or a failing renewal, is not tried again with every call.
        self._retry_at = self._clock.monotonic() + RETRY_DELAY
        self._refusal = error.message if isinstance(error, UpstreamAuth) else ""

    async def _obtain(self, send: Send) -> Token:
        """The token that replicas share, or a new one for all of them."""
        shared = self._shared
        if shared is None:
            return await self._request_token(send)
        deadline = self._clock.monotonic() + FETCH_CLAIM
        while (existing := await self._read_shared(shared)) is None and not await shared.claim(FETCH_CLAIM):
            if self._clock.monotonic() > deadline:
                break
            await self._clock.sleep(POLL_INTERVAL)  # another replica is fetching one
        if existing is not None:
            return existing
        try:
            if existing := await self._read_shared(shared):  # put there before the claim succeeded
                return existing
            token = await self._request_token(send)
            now = self._clock.monotonic()
            await shared.put(token.moved(self._clock.time() - now), token.expires_at - now)
        finally:
            await shared.release()
        return token

    async def _read_shared(self, shared: SealedTokens) -> Token | None:
        """The token from another replica, unless it was just refused or is due for renewal."""
        existing = await shared.get()
        if existing is None or existing.text == self._stale_text or existing.renew_at <= self._clock.time():
            return None
        self._token = existing.moved(self._clock.monotonic() - self._clock.time())
        self._retry_at = -1.0
        return self._token

    async def _request_token(self, send: Send) -> Token:
        reply = await send(self._token_request)
        now = self._clock.monotonic()
        try:
            body = orjson.loads(reply.body)
            if not isinstance(body, dict):
                raise TypeError("no object")
            # Baidu's SDKs ignore the status and look for `error`; we check both.
            if reply.status >= 400 or body.get("error"):
                raise _token_error(reply, body)
            text, lifetime = body["access_token"], float(body["expires_in"])
            if not (isinstance(text, str) and text and 0 < lifetime < math.inf):
                raise ValueError("no token")
        except (KeyError, TypeError, ValueError) as error:
            if reply.status >= 300:
                raise replies.make_error(replies.by_status(reply.status, ""), reply) from error
            raise UpstreamInvalidResponse("the upstream's token server answered with something else") from error
        # Renewed an hour early as Baidu's clients do, or a tenth of a shorter lifetime early.
        self._token = Token(text, now + lifetime - min(3600.0, lifetime / 10), now + lifetime)
        self._retry_at = -1.0
        return self._token


def _with_token(request: WireRequest, token: Token) -> WireRequest:
    return replace(request, query={**request.query, "access_token": token.text})


def _token_error(reply: WireReply, body: Mapping[str, object]) -> GatewayError:
    """The errors of RFC 6749, 5.2, concern our key; the others are the token server's failures."""
    error, message = str(body.get("error", "")), replies.error_fields(reply).message
    if error == "rate_limit_exceeded":
        return replies.make_error(RateLimited, reply, message)
    if reply.status >= 500 or error in ("unknown_error", "server_error", "temporarily_unavailable"):
        return replies.make_error(UpstreamError, reply, message)
    return replies.make_error(UpstreamAuth, reply, message)
