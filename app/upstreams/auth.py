"""Credentials put on requests: API keys, in turn where there are several.

Knows no adapter; what a reply means is told by the dialect. A request is never changed in place: whoever sends it may
send it again. Access tokens and signatures are `access_token` and `signature`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias
from urllib.parse import urlsplit

from msgspec.structs import replace

from app.clock import Clock
from app.config import UpstreamSettings
from app.errors import GatewayError, QuotaExhausted, RateLimited, UpstreamAuth
from app.types import Auth, Send, WireReply, WireRequest

log = logging.getLogger(__name__)

Judge: TypeAlias = Callable[[WireReply], GatewayError | None]

KEY_REFUSED_FOR = 600.0
"""Seconds for which one of several keys that is refused or used up is not tried."""


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
        self._at_rate: set[int] = set()
        """Keys that were last left out for their rate."""
        self._turn = 0

    async def __call__(self, request: WireRequest, send: Send) -> WireReply:
        if len(self._values) == 1:
            return await send(self._with(request, 0))
        refused: dict[int, GatewayError] = {}
        limited: list[tuple[float, int, WireReply]] = []
        while True:
            key = self._next(refused)
            reply = await send(self._with(request, key))
            error = self._judge(reply)
            if not isinstance(error, UpstreamAuth | RateLimited | QuotaExhausted):
                break
            refused[key] = error
            if isinstance(error, RateLimited):
                limited.append((error.retry_after or 0.0, key, reply))
            # Before callers are told of what does not pass, keys that are out for their rate are tried all the same.
            if not self._fresh(refused) and (limited or self._at_rate <= refused.keys()):
                if limited:  # where no key is taken callers are told what will pass first, if anything will
                    _, _, reply = min(limited)
                break
        # Where every key is refused it is not about the keys: the account may not use the model, for example.
        if len(refused) < len(self._values) or not all(isinstance(each, UpstreamAuth) for each in refused.values()):
            for key, error in refused.items():
                self._leave_out(key, error, request)
        return reply

    def _leave_out(self, key: int, error: GatewayError, request: WireRequest) -> None:
        """For its rate only as long as that takes. A refusal or a quota that is used up does not pass soon, and is
        logged here: while other keys serve, nothing else shows it."""
        now, seconds = self._clock.monotonic(), KEY_REFUSED_FOR
        self._at_rate.discard(key)
        if isinstance(error, RateLimited):
            self._at_rate.add(key)
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

    def _fresh(self, tried: Collection[int]) -> bool:
        """Whether a key is left that is neither tried nor out."""
        now = self._clock.monotonic()
        return any(until <= now and key not in tried for key, until in enumerate(self._out_until))

    def _next(self, tried: Collection[int]) -> int:
        """The next key in turn that is not left out; if all are, the one that comes back first."""
        now, count = self._clock.monotonic(), len(self._values)
        turns = [(self._turn + step) % count for step in range(count)]
        left = [key for key in turns if key not in tried]
        key = next((key for key in left if self._out_until[key] <= now), None)
        if key is None:
            key = min(left, key=lambda each: self._out_until[each])
        self._turn = key + 1
        return key
