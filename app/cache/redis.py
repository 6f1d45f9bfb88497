"""The tier that all replicas share. `shared_limits` and `shared_tokens` make their connections as it does.

A look-up is one MGET, behind a script that claims what is missing; a write is one pipeline of SETs. Each is one round
trip with a time limit, whatever the server does. A server that does not answer costs a few look-ups and is then left
alone for a while. What is read is verified, never trusted.

Of redis-py we take the connections (URL, TLS, AUTH, RESP). Its client and pool are left out: they retry, take several
locks per command and a task per write, and lose a handshake that outlasts the caller who began it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial

from redis.asyncio import ConnectionPool, SSLConnection
from redis.asyncio.connection import RedisSSLContext
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterCrossSlotError,
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
from app.cache.connections import CONNECT_TIMEOUT, Command, Connection, Connections
from app.cache.counts import Counts
from app.cache.health import TierHealth, describe_error
from app.cache.script import Script
from app.clock import Clock
from app.deadlines import Deadlines
from app.metrics import Metrics
from app.types import CLAIM_TTL, Embedding, LookupResult

PREFIX = b"eg:1:"
"""Before the raw hash in every key of ours: `SCAN MATCH eg:1:*` finds them."""

CLAIM_PREFIX = b"eg:claim:1:"
"""Before the same hash, in the key that says which replica is embedding the text."""

_CLAIM = Script(b"""
local held = {}
for i = 1, #KEYS, 2 do
  local claim = KEYS[i + 1]
  if redis.call('EXISTS', KEYS[i]) == 0
    and not redis.call('SET', claim, ARGV[1], 'NX', 'PX', ARGV[2])
    and redis.call('GET', claim) ~= ARGV[1]
  then
    held[#held + 1] = (i - 1) / 2
  end
end
return held
""")
"""Takes pairs of keys, a value's and its claim's; then who claims, and for how many milliseconds. Gives the places of
the values that are not there and that another claims."""

RELEASE = Script(b"""
for i = 1, #KEYS do
  if redis.call('GET', KEYS[i]) == ARGV[1] then redis.call('DEL', KEYS[i]) end
end
""")
"""Takes the keys of claims, and who made them. Claims of others stay."""

_MOVED = (ReadOnlyError, MovedError, ClusterDownError, MasterDownError)
"""The server is not, or no longer, the one to ask: a name may by now lead to another."""
_REFUSED = (AuthenticationError, AuthorizationError)
_CLUSTER = (MovedError, ClusterCrossSlotError)

_KEYS_IN_TIME = 256
"""Keys up to which a look-up has the configured time limit; for more it is longer in proportion. 2,048 vectors of 1,024
numbers are 8 MiB, for which a network of 1 Gbit/s takes 70 ms."""
_CLAIM_BATCH = 128
"""Keys that one script claims, for which the server lets everybody else wait: about half a millisecond."""
_REST = 5.0
"""Seconds without claims after one that was refused."""
_WRITE_BATCH = 64
"""Values in one pipeline: 64 of 1,024 dimensions are 256 KiB."""
_WRITE_TIMEOUT = 1.0
"""Seconds one pipeline may take where `timeout` is shorter: nobody waits for a write."""

_TLS_LASTS = 60.0
"""Seconds for which connections share what one of them has read of certificates: to read those that the system trusts
takes up to 100 ms, in which nobody is served. Then they are read anew, for they are renewed."""


def connections(url: str, limit: int, now: Callable[[], float] = time.monotonic) -> Connections:
    """Raises `ValueError`, without the URL or a piece of it, for what is none."""
    try:
        pool = ConnectionPool.from_url(
            url,
            # RESP2 and no driver's name: connecting without a password costs no round trip beyond TCP's.
            protocol=2,
            driver_info=None,
            socket_timeout=None,  # deadlines are set around whole exchanges
            socket_connect_timeout=CONNECT_TIMEOUT,
        )
        pool.make_connection()  # type: ignore[no-untyped-call]  # an option it does not know fails here
    except (ValueError, TypeError):
        raise ValueError("not a Redis URL; write redis://, rediss:// or unix://") from None
    tls: RedisSSLContext | None = None
    until = 0.0

    def make() -> Connection:
        nonlocal tls, until
        connection: Connection = pool.make_connection()  # type: ignore[no-untyped-call]
        if isinstance(connection, SSLConnection):
            if tls is None or now() >= until:
                socket.socket(socket.AF_UNIX).close()  # without a descriptor none are read: nobody would be trusted
                tls, until = connection.ssl_context, now() + _TLS_LASTS
            connection.ssl_context = tls
        return connection

    return Connections(make, limit, ResponseError, _MOVED)


class RedisStore:
    """Values at `url` (redis://, rediss://, unix://), gone after `ttl` seconds. `timeout`: seconds a look-up of up to
    `_KEYS_IN_TIME` keys may wait for the server, opening a connection included. Until one of ours is free it may wait
    for as long once more, which proves nothing about the server.

    Raises `ValueError` for a URL that is none; nothing else is ever raised.
    """

    name = "redis"
    at_once = 8
    """Half of the connections; large look-ups and writes have the others."""

    def __init__(
        self,
        url: str,
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
        self._now = clock.monotonic
        self._breaker = Breaker(clock.monotonic)
        self._connections = connections(url, max_connections)
        self._places = asyncio.Semaphore(max_connections)
        self._me = os.urandom(8).hex().encode()
        self._claims_from = 0.0
        """No claims before that: a server that refuses them, a read-only one for example, is still good to read."""
        self._large_from = 0.0
        """No large look-ups before that: one has waited in vain for its longer time limit, and those in line behind it
        are not to do so as well."""
        self._held = metrics.cache_operations.labels(self.name, "get", "held")
        self._claim_errors = metrics.cache_operations.labels(self.name, "claim", "error")
        self._troubles = TierHealth(self.name)

    @property
    def status(self) -> str:
        return self._troubles.status

    def time_limit(self, keys: int, /) -> float:
        return self._timeout * max(1.0, keys / _KEYS_IN_TIME)

    async def open(self) -> None:
        """Connects."""
        await self._ask("get", partial(self._connections.exchange, [(b"PING",)]), 0)

    async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        """One MGET. What was not found in time, or is not what was written, is None."""
        return (await self._look_up(keys, claim=False))[0]

    async def get_or_claim(self, keys: Sequence[bytes]) -> LookupResult:
        return await self._look_up(keys, claim=self._now() >= self._claims_from)

    async def _look_up(self, keys: Sequence[bytes], *, claim: bool) -> LookupResult:
        found: list[Embedding | None] = [None] * len(keys)
        if not keys:
            return found, ()
        replies = await self._ask("get", partial(self._question, keys, claim), len(keys))
        if replies is None:
            return found, ()
        raws = replies[-1] if isinstance(replies[-1], list) and len(replies[-1]) == len(keys) else [b""] * len(keys)
        found = [None if raw is None else values.decode(key, raw) for key, raw in zip(keys, raws, strict=True)]
        held = self._held_of(keys, raws, replies[:-1])
        self._tell(found, raws.count(None), len(held))
        return found, held

    async def _question(self, keys: Sequence[bytes], claim: bool) -> list[object]:
        names = [PREFIX + key for key in keys]
        calls = self._claims(keys, names) if claim else []
        # Claimed first: what comes in between is found.
        return await _CLAIM.run(self._connections, calls, [(b"MGET", *names)])

    def _tell(self, found: Sequence[Embedding | None], absent: int, held: int) -> None:
        """Counts a look-up: values that are not there, and of these the ones that another replica is embedding."""
        counts, none = self._counts, found.count(None)
        for counter, number in (
            (counts.hit, len(found) - none),
            (counts.get_corrupt, none - absent),
            (self._held, held),
            (counts.miss, absent - held),
        ):
            if number:
                counter.inc(number)

    def _claims(self, keys: Sequence[bytes], names: Sequence[bytes]) -> list[list[bytes]]:
        pairs = [each for key, name in zip(keys, names, strict=True) for each in (name, CLAIM_PREFIX + key)]
        parts = [pairs[i : i + 2 * _CLAIM_BATCH] for i in range(0, len(pairs), 2 * _CLAIM_BATCH)]
        return [[b"%d" % len(part), *part, self._me, b"%d" % round(CLAIM_TTL * 1000)] for part in parts]

    def _held_of(self, keys: Sequence[bytes], raws: Sequence[object], replies: Sequence[object]) -> Collection[bytes]:
        """Replies to claims, in order; none where nothing was claimed."""
        held: set[bytes] = set()
        for start, reply in zip(range(0, len(keys), _CLAIM_BATCH), replies, strict=False):
            if not isinstance(reply, list) or not all(i in range(len(keys) - start) for i in reply):
                self._claims_from = self._now() + _REST
                self._claim_errors.inc(len(keys))
                self._note("claim", reply if isinstance(reply, Exception) else ValueError("not a script's reply"))
                return set()
            held.update(keys[start + i] for i in reply if raws[start + i] is None)
        if replies:
            self._note("claim", None)
        return held

    async def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """SETs with a time to live, pipelined. What the server does not take is dropped and counted."""
        for start in range(0, len(entries), _WRITE_BATCH):
            part = entries[start : start + _WRITE_BATCH]
            replies = await self._ask("set", partial(self._write, part), len(part))
            if replies is None:
                continue
            errors = [reply for reply in replies[: len(part)] if isinstance(reply, Exception)]
            full = sum(isinstance(error, OutOfMemoryError) for error in errors)
            self._counts.set_dropped.inc(full)
            self._counts.set_error.inc(len(errors) - full)
            self._counts.ok.inc(len(part) - len(errors))

    async def _write(self, entries: Sequence[tuple[bytes, Embedding]]) -> list[object]:
        commands: list[Command] = [
            (b"SET", PREFIX + key, values.encode(key, embedding), b"PX", self._px) for key, embedding in entries
        ]
        # Nobody is to wait for a value that the server has not taken, or has thrown out again.
        over = (b"DEL", *(CLAIM_PREFIX + key for key, _ in entries))
        return await self._connections.exchange([*commands, over])

    async def release_claims(self, keys: Sequence[bytes]) -> None:
        if self._now() >= self._claims_from:
            names = [CLAIM_PREFIX + key for key in keys]
            call = [b"%d" % len(names), *names, self._me]
            await self._ask("set", partial(RELEASE.run, self._connections, [call]), len(keys))

    async def close(self) -> None:
        await self._connections.close()

    async def _ask(
        self, operation: str, exchange: Callable[[], Awaitable[list[object]]], count: int
    ) -> list[object] | None:
        """What `exchange` gives, or None, counted for `count` values, where that is nothing."""
        limit = self.time_limit(count) if operation == "get" else max(self._timeout, _WRITE_TIMEOUT)
        large = operation == "get" and count > _KEYS_IN_TIME
        try:
            with self._deadlines.io_timeout(limit) if self._places.locked() else nullcontext():
                await self._places.acquire()
        except TimeoutError:
            return self._skipped(operation, count)
        try:
            # Asked only now: while this one waited for its place the breaker may have opened.
            if (large and self._now() < self._large_from) or not self._breaker.allow():
                return self._skipped(operation, count)
            try:
                with self._deadlines.io_timeout(limit):
                    replies = await exchange()
                    if any(isinstance(reply, _MOVED) for reply in replies):
                        replies = await exchange()
            except asyncio.CancelledError:
                self._breaker.abandoned()
                raise
            except TimeoutError:
                if large:
                    self._large_from = self._now() + limit
                return self._failed(operation, count, TimeoutError(f"no answer within {limit * 1000:.0f} ms"))
            except Exception as error:  # this tier's outermost door
                return self._failed(operation, count, error)
        finally:
            self._places.release()
        # A look-up is its last command.
        refusals = [reply for reply in replies[-1 if operation == "get" else 0 :] if isinstance(reply, ResponseError)]
        if refusals and operation == "get":
            return self._failed(operation, count, refusals[0])
        # A server that refuses a write is up, and asked again: reads go on.
        self._breaker.succeeded()
        self._note(operation, refusals[0] if refusals else None)
        return replies

    def _skipped(self, operation: str, count: int) -> list[object] | None:
        (self._counts.get_skipped if operation == "get" else self._counts.set_skipped).inc(count)
        return None

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
        """What an operation came to, for the log and `status`."""
        if error is None:
            self._troubles.recovered(operation)
            return
        said = error.__cause__ or error  # redis-py puts what is said on a unix socket while connecting into another
        if isinstance(said, _REFUSED):
            self._troubles.failing(operation, "the server refuses our credentials", logging.ERROR)
        elif isinstance(said, NoPermissionError):
            self._troubles.failing(operation, describe_error(said), logging.ERROR)  # it says which right our user lacks
        elif isinstance(error, _CLUSTER):
            why = "the server is a node of a Redis Cluster; the cache takes a server that holds every key"
            self._troubles.failing(operation, why)
        else:
            self._troubles.failing(operation, describe_error(error))
