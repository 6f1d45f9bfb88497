"""Adds credentials to requests: API keys, which take turns if there are several.

Knows no adapter; the dialect says what a reply means. Requests are never changed in place: the sender may send them
again. Access tokens and signatures are in `access_token` and `signature`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeAlias
from urllib.parse import urlsplit

from msgspec.structs import replace

from app.clock import Clock
from app.config import UpstreamSettings
from app.errors import GatewayError, QuotaExhausted, RateLimited, UpstreamAuth
from app.logs import Seldom
from app.types import Auth, Send, TokenStore, WireReply, WireRequest

log = logging.getLogger(__name__)

ParseError: TypeAlias = Callable[[WireReply], GatewayError | None]
MakeAuth: TypeAlias = Callable[[UpstreamSettings, Clock, TokenStore | None], Auth]
"""`UpstreamKind.auth`."""

KEY_COOLDOWN = 600.0
"""Seconds for which a refused or exhausted key is not tried while there are others."""
IN_VAIN = 10.0
"""Seconds after every key has been refused in which a call is sent with one key only, whichever is next."""


def keys(settings: UpstreamSettings) -> list[str]:
    """The configured keys; empty if there is none."""
    secrets = (settings.api_key,) if settings.api_key is not None else settings.api_keys
    return [secret.get_secret_value() for secret in secrets]


def in_header(header: str, values: Sequence[str], parse_error: ParseError, clock: Clock) -> Auth:
    """One of the values in this header, or no header without any."""
    return HeaderKey(header, values, parse_error, clock) if values else NoAuth()


def bearer(keys: Sequence[str], parse_error: ParseError, clock: Clock) -> Auth:
    """`Authorization: Bearer …`, or no header without a key."""
    return in_header("authorization", [f"Bearer {key}" for key in keys], parse_error, clock)


def by_bearer(parse_error: ParseError) -> MakeAuth:
    """The `auth` of a kind whose keys are bearer tokens."""
    return lambda settings, clock, _tokens: bearer(keys(settings), parse_error, clock)


def by_header(header: str, parse_error: ParseError) -> MakeAuth:
    """The `auth` of a kind whose keys go in a header of its own."""
    return lambda settings, clock, _tokens: in_header(header, keys(settings), parse_error, clock)


class NoAuth:
    """For servers that need no key."""

    async def __call__(self, request: WireRequest, send: Send) -> WireReply:
        return await send(request)


class HeaderKey:
    """A key in a header. Several keys take turns: one that is refused, exhausted or rate-limited is suspended by
    itself, and the call is sent again at once with the next.

    `parse_error` is the dialect's.
    """

    def __init__(self, header: str, values: Iterable[str], parse_error: ParseError, clock: Clock) -> None:
        self._header = header
        self._values = list(values)
        self._parse_error, self._clock = parse_error, clock
        self._suspended_until = [0.0] * len(self._values)
        self._seldom = Seldom(clock.monotonic)
        self._next_index = 0
        self._in_vain_until = 0.0

    async def __call__(self, request: WireRequest, send: Send) -> WireReply:
        if len(self._values) == 1:
            return await send(self._with_key(request, 0))
        errors: dict[int, GatewayError] = {}
        limited: list[tuple[float, int, WireReply]] = []
        while True:
            key = self._next_key(errors)
            suspended_until = self._suspended_until[key]
            reply = await send(self._with_key(request, key))
            error = self._parse_error(reply)
            if not isinstance(error, UpstreamAuth | RateLimited | QuotaExhausted):
                if error is None and self._suspended_until[key] == suspended_until:  # and not anew meanwhile
                    self._suspended_until[key] = self._in_vain_until = 0.0
                break
            if not isinstance(error, RateLimited) and self._clock.monotonic() < self._in_vain_until:
                break
            errors[key] = error
            if isinstance(error, RateLimited):
                limited.append((error.retry_after or 0.0, key, reply))
            # Suspended keys are tried after all before callers get an error that will not pass: they may be used up for
            # another model only.
            if len(errors) == len(self._values) or (limited and not self._any_available(errors)):
                if limited:  # no key works: callers get the error that passes first
                    _, _, reply = min(limited)
                break
        self._record(errors, request)
        return reply

    def _record(self, errors: Mapping[int, GatewayError], request: WireRequest) -> None:
        """Suspends the keys that were refused; unless all were, and none for its rate: then none is worse than another,
        for the account may not use the model, and for a while calls try one only."""
        if len(errors) == len(self._values) and not any(isinstance(each, RateLimited) for each in errors.values()):
            self._in_vain_until = self._clock.monotonic() + IN_VAIN
            return
        for key, error in errors.items():
            self._suspend(key, error, request)

    def _suspend(self, key: int, error: GatewayError, request: WireRequest) -> None:
        """Takes the key out of the rotation: a rate-limited one only until it may be used again, a refused or exhausted
        one for longer. The latter is logged: while other keys serve, nothing else shows it."""
        now, seconds = self._clock.monotonic(), KEY_COOLDOWN
        if isinstance(error, RateLimited):
            # What an upstream gives as seconds may be a date.
            seconds = min(seconds, 1.0 if error.retry_after is None else error.retry_after)
        elif self._suspended_until[key] <= now and self._seldom(key):
            log.warning(
                "%s: key %d of %d is not used for %g s: %s",
                urlsplit(request.url).hostname,
                key + 1,
                len(self._values),
                seconds,
                error.code,
            )
        self._suspended_until[key] = now + seconds

    def _with_key(self, request: WireRequest, key: int) -> WireRequest:
        return replace(request, headers={**request.headers, self._header: self._values[key]})

    def _any_available(self, tried: Collection[int]) -> bool:
        """Whether a key is neither tried nor suspended."""
        now = self._clock.monotonic()
        return any(until <= now and key not in tried for key, until in enumerate(self._suspended_until))

    def _next_key(self, tried: Collection[int]) -> int:
        """The next untried key that is not suspended; if all are, the one whose suspension ends first."""
        now, count = self._clock.monotonic(), len(self._values)
        rotation = [(self._next_index + step) % count for step in range(count)]
        untried = [key for key in rotation if key not in tried]
        key = next((key for key in untried if self._suspended_until[key] <= now), None)
        if key is None:
            key = min(untried, key=lambda each: self._suspended_until[each])
        self._next_index = key + 1
        return key
