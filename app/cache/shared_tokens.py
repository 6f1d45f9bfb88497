"""Access tokens on the Redis server, sealed by the caller. Losing them costs a fetch, never an answer."""

from __future__ import annotations

import logging
from functools import partial

from app.cache.connections import Command
from app.cache.health import Outage
from app.cache.link import Exchange, Failure, Link
from app.cache.script import RELEASE
from app.clock import Clock
from app.metrics import Metrics

log = logging.getLogger(__name__)

PREFIX = b"eg:token:1:"


class SharedTokens:
    """Sealed tokens by name at `url`. `timeout`: seconds a command may wait for the server.

    The constructor raises `ValueError` for an invalid URL; nothing else is ever raised.
    """

    def __init__(self, url: str, timeout: float, clock: Clock, metrics: Metrics) -> None:
        self._timeout = timeout
        self._link = Link(url, 2, clock.monotonic)
        self._outage = Outage(clock.monotonic)
        self._operations = partial(metrics.cache_operations.labels, "redis", "token")
        """The series of a result."""

    async def get(self, name: bytes) -> bytes | None:
        reply = await self._ask((b"GET", PREFIX + name))
        return reply if isinstance(reply, bytes) else None

    async def put(self, name: bytes, sealed: bytes, seconds: float) -> None:
        await self._ask((b"SET", PREFIX + name, sealed, b"PX", b"%d" % max(1, round(seconds * 1000))))

    async def claim(self, name: bytes, seconds: float) -> bool:
        milliseconds = b"%d" % max(1, round(seconds * 1000))
        command = (b"SET", PREFIX + name + b":claim", self._link.replica, b"NX", b"PX", milliseconds)
        return await self._ask(command, default=b"OK") is not None

    async def release(self, name: bytes) -> None:
        """Ends this replica's claim. If it had expired, the claim may be another replica's by now and stays."""
        call = [b"1", PREFIX + name + b":claim", self._link.replica]
        await self._run(partial(RELEASE.run, self._link.connections, [call]))

    async def close(self) -> None:
        await self._link.close()

    async def _ask(self, command: Command, default: bytes | None = None) -> object:
        return await self._run(partial(self._link.connections.exchange, [command]), default)

    async def _run(self, exchange: Exchange, default: bytes | None = None) -> object:
        """The reply to a single command, or `default` if there is none."""
        replies = await self._link.ask(exchange, self._timeout, _refusal)
        if isinstance(replies, Failure):
            self._operations(replies.result).inc()
            if replies.error is not None and self._outage.failing(why := type(replies.error).__name__):
                log.warning("redis tokens: not shared this time: %s", why)
            return default
        self._operations("ok").inc()
        self._outage.recovered()
        return replies[0]


def _refusal(replies: list[object]) -> Exception | None:
    return replies[0] if isinstance(replies[0], Exception) else None
