"""The tier all replicas share; with `shared_limits`, which borrows its connections, the only import of redis.

One MGET per look-up, one pipeline of SETs per write, both within a time limit whatever the server does; one that does
not answer costs a few look-ups and is then left alone for a while. What is read is verified, never trusted.

Of redis-py we take the connections (URL, TLS, AUTH, RESP). Its client and pool are left out: they retry, take several
locks per command and a task per write, and lose a handshake that outlasts the caller who began it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from pydantic import SecretStr
from redis.asyncio import ConnectionPool
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from app.cache import values
from app.cache.breaker import Breaker
from app.cache.connections import CONNECT_TIMEOUT, Command, Connections
from app.cache.counts import Counts
from app.clock import Clock
from app.deadlines import Deadlines
from app.metrics import Metrics
from app.types import Embedding

log = logging.getLogger(__name__)

PREFIX = b"eg:1:"
"""Before the raw hash in every key of ours: `SCAN MATCH eg:1:*` finds them."""

_MOVED = (ReadOnlyError, MovedError, ClusterDownError, MasterDownError)
"""The server is not, or no longer, the one to ask: a name may by now lead to another."""
_REFUSED = (AuthenticationError, AuthorizationError, NoPermissionError)

_WRITE_BATCH = 64
"""Values in one pipeline: 64 of 1,024 dimensions are 256 KiB."""
_WRITE_TIMEOUT = 1.0
"""Seconds one pipeline may take where `timeout` is shorter: nobody waits for a write."""


def connections(url: SecretStr | str, limit: int) -> Connections:
    """Raises `ValueError`, without the URL or a piece of it, for what is none."""
    try:
        pool = ConnectionPool.from_url(
            url.get_secret_value() if isinstance(url, SecretStr) else url,
            # RESP2 and no driver's name: connecting without a password costs no round trip beyond TCP's.
            protocol=2,
            driver_info=None,
            socket_timeout=None,  # deadlines are set around whole exchanges
            socket_connect_timeout=CONNECT_TIMEOUT,
        )
        pool.make_connection()  # type: ignore[no-untyped-call]  # an option it does not know fails here
    except (ValueError, TypeError):
        raise ValueError("not a Redis URL; write redis://, rediss:// or unix://") from None
    return Connections(pool.make_connection, limit, ResponseError)


class RedisStore:
    """Values at `url` (redis://, rediss://, unix://), gone after `ttl` seconds. `timeout`: seconds a look-up may take
    in all, waiting for a connection and opening it included.

    Raises `ValueError` for a URL that is none; nothing else is ever raised.
    """

    name = "redis"

    def __init__(
        self,
        url: SecretStr | str,
        timeout: float,
        ttl: float,
        clock: Clock,
        metrics: Metrics,
        *,
        max_connections: int = 16,
    ) -> None:
        self._deadlines = Deadlines()
        self._timeout = timeout
        self._px = b"%d" % max(1, round(ttl * 1000))
        self._counts = Counts(metrics, self.name)
        self._breaker = Breaker(clock.monotonic)
        self._connections = connections(url, max_connections)
        self._trouble: dict[str, str] = {}
        """What was last wrong with reading and with writing, where something is."""

    def __repr__(self) -> str:
        return f"<RedisStore {self.status}>"

    @property
    def status(self) -> str:
        """ "up", or "down: " and why look-ups fail, or "up; writes fail: " and why."""
        if "get" in self._trouble:
            return f"down: {self._trouble['get']}"
        if "set" in self._trouble:
            return f"up; writes fail: {self._trouble['set']}"
        return "up"

    async def open(self) -> None:
        """Connects ahead of the first request, so that `status` is true from the start. Never fails."""
        if self._breaker.allow():
            await self._ask("get", [(b"PING",)], 0)

    async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        """One MGET. What was not found in time, or is not what was written, is None."""
        found: list[Embedding | None] = [None] * len(keys)
        if not keys:
            return found
        counts = self._counts
        if not self._breaker.allow():
            counts.get_skipped.inc(len(keys))
            return found
        replies = await self._ask("get", [(b"MGET", *(PREFIX + key for key in keys))], len(keys))
        if replies is None:
            return found
        hits = corrupt = 0
        raws = replies[0] if isinstance(replies[0], list) and len(replies[0]) == len(keys) else [b""] * len(keys)
        for index, raw in enumerate(raws):
            if raw is None:
                continue
            embedding = found[index] = values.decode(keys[index], raw)
            if embedding is None:
                corrupt += 1
            else:
                hits += 1
        if hits:
            counts.hit.inc(hits)
        if corrupt:
            counts.get_corrupt.inc(corrupt)
        if misses := len(keys) - hits - corrupt:
            counts.miss.inc(misses)
        return found

    async def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """SETs with a time to live, pipelined. What the server does not take is dropped and counted."""
        for start in range(0, len(entries), _WRITE_BATCH):
            part = entries[start : start + _WRITE_BATCH]
            if not self._breaker.allow():
                self._counts.set_skipped.inc(len(part))
                continue
            commands: list[Command] = [
                (b"SET", PREFIX + key, values.encode(key, embedding), b"PX", self._px) for key, embedding in part
            ]
            replies = await self._ask("set", commands, len(part))
            if replies is None:
                continue
            errors = [reply for reply in replies if isinstance(reply, Exception)]
            full = sum(isinstance(error, OutOfMemoryError) for error in errors)
            self._counts.set_dropped.inc(full)
            self._counts.set_error.inc(len(errors) - full)
            self._counts.ok.inc(len(replies) - len(errors))

    async def close(self) -> None:
        await self._connections.close()

    async def _ask(self, operation: str, commands: Sequence[Command], count: int) -> list[object] | None:
        """The replies, one per command, or None, counted for `count` values, where there are none.

        The breaker has let this through and is told how it went.
        """
        limit = self._timeout if operation == "get" else max(self._timeout, _WRITE_TIMEOUT)
        try:
            with self._deadlines.within(limit):
                replies = await self._connections.exchange(commands)
                if any(isinstance(reply, _MOVED) for reply in replies):
                    await self._connections.drop_idle()
                    replies = await self._connections.exchange(commands)
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        except TimeoutError:
            return self._failed(operation, count, TimeoutError(f"no answer within {limit * 1000:.0f} ms"))
        except Exception as error:  # this tier's outermost door
            return self._failed(operation, count, error)
        refusals = [reply for reply in replies if isinstance(reply, ResponseError)]
        if refusals and operation == "get":
            return self._failed(operation, count, refusals[0])
        # A server that refuses a write is up, and asked again: reads go on.
        self._breaker.succeeded()
        self._note(operation, refusals[0] if refusals else None)
        return replies

    def _failed(self, operation: str, count: int, error: Exception) -> list[object] | None:
        self._breaker.failed()
        counts = self._counts
        if isinstance(error, TimeoutError):
            (counts.get_timeout if operation == "get" else counts.set_timeout).inc(count)
        else:
            (counts.get_error if operation == "get" else counts.set_error).inc(count)
        self._note(operation, error)
        return None

    def _note(self, operation: str, error: Exception | None) -> None:
        """Remembers and logs a change of state, and only a change."""
        before = self._trouble.get(operation)
        if error is None:
            if before is not None:
                del self._trouble[operation]
                log.warning("redis cache: %s works again", operation)
            return
        refused = next((each for each in (error, error.__cause__) if isinstance(each, _REFUSED)), None)
        now = "the server refuses our credentials" if refused else f"{type(error).__name__}: {error}"
        self._trouble[operation] = now
        if before == now:
            return
        level = logging.ERROR if refused else logging.WARNING
        log.log(level, "redis cache: %s fails, requests are served without it: %s", operation, now)
