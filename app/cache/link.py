"""What each user of the Redis server asks it through: bounded connections, a time limit and a breaker. Raises nothing.

Only redis-py's connections are used (URL, TLS, AUTH, RESP), not its client or pool: those retry, take several locks per
command and a task per write, and lose a handshake that outlasts the caller who began it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple, TypeAlias

from redis.asyncio import ConnectionPool, SSLConnection
from redis.asyncio.connection import RedisSSLContext
from redis.exceptions import ClusterDownError, MasterDownError, MovedError, ReadOnlyError, ResponseError

from app.cache.breaker import Breaker
from app.cache.coalescer import WeightedSemaphore
from app.cache.connections import CONNECT_TIMEOUT, Connection, Connections
from app.deadlines import Deadlines
from app.descriptors import require_descriptor

Exchange: TypeAlias = Callable[[], Awaitable[list[object]]]

MOVED = (ReadOnlyError, MovedError, ClusterDownError, MasterDownError)
"""This is the wrong server, or no longer the right one: the host name may resolve to another by now."""

_TLS_CONTEXT_TTL = 60.0
"""Seconds for which connections share one TLS context. Reading the system's trusted certificates takes up to 100 ms,
during which nobody is served; they are reread because certificates are renewed."""


class Failure(NamedTuple):
    """Why there is no answer."""

    result: Literal["skipped", "timeout", "error"]
    """As the metrics label it."""
    error: Exception | None = None
    """None if the server was not asked."""


class Skipped(Exception):  # nothing has failed
    """Raised by an exchange that is not to be made after all."""


class Link:
    """A user's link to the server at `url`. `now` returns the seconds of a monotonic clock. `repeatable`: whether an
    exchange does no harm if it is made twice; one that met the wrong server is then made once more.

    The constructor raises `ValueError` for an invalid URL.
    """

    def __init__(self, url: str, max_connections: int, now: Callable[[], float], *, repeatable: bool = False) -> None:
        self.connections = connections(url, max_connections, now)
        self.replica = os.urandom(8).hex().encode()
        """What tells this user from those of other replicas."""
        self._repeatable = repeatable
        self._slots = WeightedSemaphore(max_connections)
        self._breaker = Breaker(now)
        self._deadlines = Deadlines()

    @property
    def away(self) -> bool:
        """Whether the server stopped answering, and has not answered since."""
        return self._breaker.is_open

    async def ask(
        self, exchange: Exchange, seconds: float, refusal: Callable[[list[object]], Exception | None]
    ) -> list[object] | Failure:
        """The replies of `exchange`. The server has `seconds` for them, opening a connection included. The exchange may
        wait as long again for a free connection, which says nothing about the server. Whatever it raises, and what
        `refusal` finds in its replies, counts as no answer. After a few of those in a row the server is taken for away,
        and left alone for a while."""
        if not self._slots.try_acquire(1):
            try:
                with self._deadlines.io_timeout(seconds):
                    await self._slots.acquire(1)
            except TimeoutError:
                return Failure("skipped")
        try:
            # Checked here because the breaker may have opened while this call waited for a connection.
            if not self._breaker.allow():
                return Failure("skipped")
            with self._deadlines.io_timeout(seconds):
                replies = await exchange()
                if self._repeatable and any(isinstance(reply, MOVED) for reply in replies):
                    replies = await exchange()
            error = refusal(replies)
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        except Skipped:
            self._breaker.abandoned()
            return Failure("skipped")
        except TimeoutError:
            self._breaker.failed()
            return Failure("timeout", TimeoutError(f"no answer within {seconds * 1000:.0f} ms"))
        except Exception as fault:
            error = fault
        finally:
            self._slots.release(1)
        if error is not None:
            self._breaker.failed()
            return Failure("error", error)
        self._breaker.succeeded()
        return replies

    async def close(self) -> None:
        await self.connections.close()


def connections(url: str, limit: int, now: Callable[[], float]) -> Connections:
    """A pool of at most `limit` connections. Raises `ValueError` for an invalid URL, without quoting any of it."""
    try:
        pool = ConnectionPool.from_url(
            url,
            # RESP2 and no driver name: without a password, connecting costs no round trip beyond TCP's.
            protocol=2,
            driver_info=None,
            socket_timeout=None,  # deadlines cover whole exchanges
            socket_connect_timeout=CONNECT_TIMEOUT,
        )
        pool.make_connection()  # type: ignore[no-untyped-call]  # fails on an unknown option
    except (ValueError, TypeError):
        raise ValueError("not a Redis URL; write redis://, rediss:// or unix://") from None
    tls: RedisSSLContext | None = None
    valid_until = 0.0

    def make() -> Connection:
        nonlocal tls, valid_until
        connection: Connection = pool.make_connection()  # type: ignore[no-untyped-call]
        if isinstance(connection, SSLConnection):
            if tls is None or now() >= valid_until:
                require_descriptor()  # without one the context would load no certificates and trust nobody
                tls, valid_until = connection.ssl_context, now() + _TLS_CONTEXT_TTL
            connection.ssl_context = tls
        return connection

    return Connections(make, limit, ResponseError, MOVED)
