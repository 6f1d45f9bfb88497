"""The tier that all replicas share.

A lookup is one MGET, preceded by a script that claims the missing keys; a write is one pipeline of SETs. Each is one
round trip with a time limit, whatever the server does. A server that does not answer costs a few lookups and is then
left alone for a while. Values read are verified: what is damaged or another key's is a miss, but not what is forged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterCrossSlotError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ResponseError,
)

from app.cache import values
from app.cache.connections import Command
from app.cache.counts import Counts
from app.cache.health import TierHealth, describe_error
from app.cache.link import MOVED, Exchange, Failure, Link, Skipped
from app.cache.script import RELEASE, Script
from app.cache.store import CLAIM_TTL, LookupResult
from app.clock import Clock
from app.metrics import Metrics
from app.types import Embedding

PREFIX = b"eg:1:"
"""Precedes the raw hash in every key of ours: `SCAN MATCH eg:1:*` finds them."""

CLAIM_PREFIX = b"eg:claim:1:"
"""Precedes the same hash in the key that says which replica is embedding the text."""

ALIVE_PREFIX = b"eg:alive:1:"
"""Precedes a replica's name in a key that exists while the replica is alive. The claims of any other are void, so that
renewing this one key renews all claims of the replica."""

_CLAIM = Script(b"""
local replica, lifetime, prefix, alive = ARGV[1], ARGV[2], ARGV[3], {}
redis.call('SET', prefix .. replica, '', 'PX', ARGV[4])
local held = {}
for i = 1, #KEYS, 2 do
  local claim = KEYS[i + 1]
  if redis.call('EXISTS', KEYS[i]) == 0 and not redis.call('SET', claim, replica, 'NX', 'PX', lifetime) then
    local owner = redis.call('GET', claim)
    if alive[owner] == nil then alive[owner] = owner ~= replica and redis.call('EXISTS', prefix .. owner) == 1 end
    if alive[owner] then held[#held + 1] = (i - 1) / 2 else redis.call('SET', claim, replica, 'PX', lifetime) end
  end
end
return held
""")
"""KEYS: pairs of a value's key and its claim's key. ARGV: the claiming replica, the milliseconds after which its claims
vanish, `ALIVE_PREFIX`, and the milliseconds for which the replica counts as alive. Returns the indexes (from 0) of
values that are absent and claimed by another replica that is alive."""

_NOT_NOW = ("BUSY ", "MISCONF ", "NOREPLICAS ")
"""How refusals begin that pass once a script has ended, the disk has room or a replica is back."""
_BAD_CREDENTIALS = (AuthenticationError, AuthorizationError)
_CLUSTER = (MovedError, ClusterCrossSlotError)

_LARGE_LOOKUP = 256
"""Keys above which the configured time limit of a lookup grows in proportion. 2,048 vectors of 1,024 dimensions are
8 MiB, which take 70 ms at 1 Gbit/s."""
_CLAIM_BATCH = 128
"""Keys claimed by one run of the script, which blocks the server for about half a millisecond."""
_CLAIM_PAUSE = 5.0
"""Seconds without claims after one was refused."""
_WRITE_BATCH = 64
"""Values in one pipeline: 64 vectors of 1,024 dimensions are 256 KiB."""
_WRITE_TIMEOUT = 1.0
"""Seconds one pipeline may take, where `timeout` is shorter: nobody waits for a write."""


class RedisStore:
    """Values at `url` (redis://, rediss://, unix://), each kept for `ttl` seconds. `timeout`: seconds a lookup of at
    most `_LARGE_LOOKUP` keys may wait for the server, opening a connection included. It may wait as long again for a
    free connection, which says nothing about the server.

    The constructor raises `ValueError` for an invalid URL; nothing else is ever raised.
    """

    name = "redis"
    at_once = 8
    """Half of the connections, unless `max_connections` says otherwise; the others are for large lookups and writes."""

    def __init__(
        self,
        url: str,
        timeout: float,
        ttl: float,
        clock: Clock,
        metrics: Metrics,
        *,
        claim_lifetime: Callable[[], float] = lambda: 60.0,
        max_connections: int = 16,
    ) -> None:
        """`claim_lifetime` returns the seconds after which a claim vanishes even if its replica is alive: a request's
        time, which a reload may change."""
        self._timeout = timeout
        self._px = b"%d" % max(1, round(ttl * 1000))
        self._claim_lifetime = claim_lifetime
        self._counts = Counts(metrics, self.name)
        self._now = clock.monotonic
        self._link = Link(url, max_connections, clock.monotonic, repeatable=True)
        self._connections, self._replica = self._link.connections, self._link.replica
        self._refuses_writes = False
        """Whether the server refused the last write, and may take it later, as in a failover."""
        self._no_claims_until = 0.0
        """A server that refuses claims, for example a read-only one, can still be read."""
        self._no_large_until = 0.0
        """Set when a large lookup has timed out, so that those queued behind it do not wait out its longer limit as
        well."""
        self._operations = partial(metrics.cache_operations.labels, self.name)
        """The series of an operation and its result."""
        self._held, self._claim_errors = self._operations("get", "held"), self._operations("claim", "error")
        self._health = TierHealth(self.name, clock.monotonic)

    @property
    def status(self) -> str:
        return self._health.status

    def time_limit(self, keys: int, /) -> float:
        return self._timeout * max(1.0, keys / _LARGE_LOOKUP)

    async def open(self) -> None:
        """Connects."""
        await self._attempt("get", partial(self._connections.exchange, [(b"PING",)]), 0)

    async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        """One MGET. None for a value that was not found in time or is not as it was written."""
        return (await self._look_up(keys, claim=False))[0]

    async def get_or_claim(self, keys: Sequence[bytes]) -> LookupResult:
        return await self._look_up(keys, claim=self._now() >= self._no_claims_until)

    async def _look_up(self, keys: Sequence[bytes], *, claim: bool) -> LookupResult:
        found: list[Embedding | None] = [None] * len(keys)
        if not keys:
            return found, ()
        replies = await self._attempt("get", partial(self._read, keys, claim), len(keys))
        if replies is None:
            return found, ()
        raws = replies[-1] if isinstance(replies[-1], list) and len(replies[-1]) == len(keys) else [b""] * len(keys)
        found = [None if raw is None else values.decode(key, raw) for key, raw in zip(keys, raws, strict=True)]
        held = self._claimed_elsewhere(keys, raws, replies[:-1])
        self._count(found, raws.count(None), len(held))
        return found, held

    async def _read(self, keys: Sequence[bytes], claim: bool) -> list[object]:
        if len(keys) > _LARGE_LOOKUP and self._now() < self._no_large_until:
            raise Skipped
        names = [PREFIX + key for key in keys]
        calls = self._claim_calls(keys, names) if claim else []
        # Claims come before MGET, which then finds a value written in between.
        return await _CLAIM.run(self._connections, calls, [(b"MGET", *names)])

    def _count(self, found: Sequence[Embedding | None], absent: int, held: int) -> None:
        """Counts a lookup. `absent`: values the server does not have; `held`: those another replica is embedding."""
        counts, unusable = self._counts, found.count(None)
        for counter, number in (
            (counts.hit, len(found) - unusable),
            (counts.get_corrupt, unusable - absent),
            (self._held, held),
            (counts.miss, absent - held),
        ):
            if number:
                counter.inc(number)

    def _claim_calls(self, keys: Sequence[bytes], names: Sequence[bytes]) -> list[list[bytes]]:
        pairs = [item for key, name in zip(keys, names, strict=True) for item in (name, CLAIM_PREFIX + key)]
        batches = [pairs[i : i + 2 * _CLAIM_BATCH] for i in range(0, len(pairs), 2 * _CLAIM_BATCH)]
        px = b"%d" % max(1, round(self._claim_lifetime() * 1000))
        arguments = (self._replica, px, ALIVE_PREFIX, b"%d" % (CLAIM_TTL * 1000))
        return [[b"%d" % len(batch), *batch, *arguments] for batch in batches]

    def _claimed_elsewhere(
        self, keys: Sequence[bytes], raws: Sequence[object], replies: Sequence[object]
    ) -> Collection[bytes]:
        """The keys held by other replicas. `replies` answer the claims, in order; empty if nothing was claimed."""
        held: set[bytes] = set()
        for start, reply in zip(range(0, len(keys), _CLAIM_BATCH), replies, strict=False):
            if not isinstance(reply, list) or not all(i in range(len(keys) - start) for i in reply):
                self._no_claims_until = self._now() + _CLAIM_PAUSE
                self._claim_errors.inc(len(keys))
                self._report("claim", reply if isinstance(reply, Exception) else ValueError("not a script's reply"))
                return set()
            held.update(keys[start + i] for i in reply if raws[start + i] is None)
        if replies:
            self._report("claim", None)
        return held

    async def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> list[tuple[bytes, Embedding]]:
        """Pipelines SETs with a time to live. Values the server refuses for good are dropped and counted. Returns the
        entries for which there was no answer, or a refusal that may pass."""
        left: list[tuple[bytes, Embedding]] = []
        for start in range(0, len(entries), _WRITE_BATCH):
            batch = entries[start : start + _WRITE_BATCH]
            replies = await self._attempt("set", partial(self._write, batch), len(batch))
            if replies is None:
                left += batch
                continue
            errors = [reply for reply in replies[: len(batch)] if isinstance(reply, Exception)]
            refused = [entry for entry, reply in zip(batch, replies, strict=False) if _may_pass(reply)]
            left += refused
            self._refuses_writes = bool(refused)
            full = sum(isinstance(error, OutOfMemoryError) for error in errors)
            self._counts.set_dropped.inc(full)
            self._counts.set_error.inc(len(errors) - full)
            self._counts.ok.inc(len(batch) - len(errors))
        return left

    async def takes_writes(self) -> bool:
        if self._link.away:
            await self.open()  # a probe without values to lose
        if self._refuses_writes and not self._link.away:
            replies = await self._say_alive()
            self._refuses_writes = replies is None or _may_pass(replies[0])
        return not (self._link.away or self._refuses_writes)

    async def _write(self, entries: Sequence[tuple[bytes, Embedding]]) -> list[object]:
        commands: list[Command] = [
            (b"SET", PREFIX + key, values.encode(key, embedding), b"PX", self._px) for key, embedding in entries
        ]
        # Claims end even if the server refuses or evicts a value, so that no replica waits for it.
        release = (b"DEL", *(CLAIM_PREFIX + key for key, _ in entries))
        return await self._connections.exchange([*commands, release])

    async def renew_claims(self) -> None:
        if self._now() >= self._no_claims_until:
            await self._say_alive()

    async def _say_alive(self) -> list[object] | None:
        alive = (b"SET", ALIVE_PREFIX + self._replica, b"", b"PX", b"%d" % (CLAIM_TTL * 1000))
        return await self._attempt("set", partial(self._connections.exchange, [alive]), 0)

    async def release_claims(self, keys: Sequence[bytes]) -> None:
        if self._now() >= self._no_claims_until:
            names = [CLAIM_PREFIX + key for key in keys]
            call = [b"%d" % len(names), *names, self._replica]
            await self._attempt("set", partial(RELEASE.run, self._connections, [call]), len(keys))

    async def close(self) -> None:
        await self._link.close()

    async def _attempt(self, operation: str, exchange: Exchange, count: int) -> list[object] | None:
        """The replies of `exchange`; None if it was skipped or failed, which is counted for `count` values."""
        lookup = operation == "get"
        limit = self.time_limit(count) if lookup else max(self._timeout, _WRITE_TIMEOUT)
        replies = await self._link.ask(exchange, limit, _lookup_refusal if lookup else _no_refusal)
        if not isinstance(replies, Failure):
            # A server that refuses writes is up: reads go on.
            refusals = [] if lookup else [reply for reply in replies if isinstance(reply, ResponseError)]
            self._report(operation, refusals[0] if refusals else None)
            return replies
        self._operations(operation, replies.result).inc(count)
        if replies.result == "timeout" and lookup and count > _LARGE_LOOKUP:
            self._no_large_until = self._now() + limit
        if replies.error is not None:
            self._report(operation, replies.error)
        return None

    def _report(self, operation: str, error: Exception | None) -> None:
        """Records the outcome of an operation for the log and `status`."""
        if error is None:
            self._health.recovered(operation)
            return
        cause = error.__cause__ or error  # redis-py wraps an error reply to the handshake over a unix socket
        # Without a password, a long command is refused in other words than a short one.
        if isinstance(cause, _BAD_CREDENTIALS) or "unauthenticated" in str(cause):
            self._health.failing(operation, "the server refuses our credentials", logging.ERROR)
        elif isinstance(cause, NoPermissionError):
            self._health.failing(
                operation, describe_error(cause), logging.ERROR
            )  # it names the permission our user lacks
        elif isinstance(error, _CLUSTER):
            why = "the server is a node of a Redis Cluster; the cache takes a server that holds every key"
            self._health.failing(operation, why)
        else:
            self._health.failing(operation, describe_error(error))


def _lookup_refusal(replies: list[object]) -> Exception | None:
    """The last command of a lookup is the MGET; the claims before it may fail."""
    return replies[-1] if isinstance(replies[-1], ResponseError) else None


def _no_refusal(_replies: list[object]) -> None:
    """A write that is refused is an answer."""


def _may_pass(reply: object) -> bool:
    """Whether this is a refusal to write that the same server, or another one behind its name, will soon take back."""
    return isinstance(reply, MOVED) or (isinstance(reply, ResponseError) and str(reply).startswith(_NOT_NOW))
