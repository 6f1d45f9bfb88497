"""Access tokens on the Redis server, sealed by the caller. Losing them costs a fetch, never an answer."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial

from app.cache.connections import Command
from app.cache.redis import RELEASE, connections
from app.deadlines import Deadlines
from app.metrics import Metrics

log = logging.getLogger(__name__)

PREFIX = b"eg:token:1:"


class SharedTokens:
    """Sealed tokens by name at `url`. `timeout`: seconds a command may wait for the server.

    The constructor raises `ValueError` for an invalid URL; nothing else is ever raised. Used once a month per key, so
    it has no breaker.
    """

    def __init__(self, url: str, timeout: float, metrics: Metrics) -> None:
        self._deadlines = Deadlines()
        self._timeout = timeout
        self._connections = connections(url, 2)
        self._replica = os.urandom(8).hex().encode()

        def count(result: str) -> None:
            metrics.cache_operations.labels("redis", "token", result).inc()

        self._count = count

    async def get(self, name: bytes) -> bytes | None:
        reply = await self._ask((b"GET", PREFIX + name))
        return reply if isinstance(reply, bytes) else None

    async def put(self, name: bytes, sealed: bytes, seconds: float) -> None:
        await self._ask((b"SET", PREFIX + name, sealed, b"PX", b"%d" % max(1, round(seconds * 1000))))

    async def claim(self, name: bytes, seconds: float) -> bool:
        milliseconds = b"%d" % max(1, round(seconds * 1000))
        command = (b"SET", PREFIX + name + b":claim", self._replica, b"NX", b"PX", milliseconds)
        return await self._ask(command, default=b"OK") is not None

    async def release(self, name: bytes) -> None:
        """Ends this replica's claim. If it had expired, the claim may be another replica's by now and stays."""
        call = [b"1", PREFIX + name + b":claim", self._replica]
        await self._run(partial(RELEASE.run, self._connections, [call]))

    async def close(self) -> None:
        await self._connections.close()

    async def _ask(self, command: Command, default: bytes | None = None) -> object:
        return await self._run(partial(self._connections.exchange, [command]), default)

    async def _run(self, exchange: Callable[[], Awaitable[list[object]]], default: bytes | None = None) -> object:
        """The reply to a single command, or `default` if there is none."""
        try:
            with self._deadlines.io_timeout(self._timeout):
                (reply,) = await exchange()
            if isinstance(reply, Exception):
                raise reply
        except Exception as error:  # never raises: a token that cannot be shared is fetched
            self._count("timeout" if isinstance(error, TimeoutError) else "error")
            log.warning("redis tokens: not shared this time: %s", type(error).__name__)
            return default
        self._count("ok")
        return reply
