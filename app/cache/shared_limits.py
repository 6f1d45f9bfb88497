"""Rate limits shared by all replicas: one run of a script per question, on the Redis server and by its clock. Questions
asked in one turn of the event loop share a round trip.

Fails open and says so: if the server does not answer in time there is no verdict, and the caller enforces its own share
of the limit (`replicas` is the number of sharers).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from app.cache.coalescer import Coalescer
from app.cache.health import Outage, describe_error
from app.cache.link import Failure, Link
from app.cache.script import Script
from app.clock import Clock
from app.limits import Bucket, Limit
from app.metrics import Metrics

log = logging.getLogger(__name__)

PREFIX = b"{eg:limits}:2:"
"""Precedes every key. The braces, a hash tag, keep all keys on one node of a cluster."""

REPLICA_TTL = 60
"""Seconds for which a replica that asked counts among those that share the limits."""

_BATCH = 64
"""Questions in one round trip."""
_MAX_CONNECTIONS = 16
"""Round trips at once."""

_SCRIPT = Script(b"""
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
redis.call('ZADD', KEYS[2], time[1], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', tonumber(time[1]) - tonumber(ARGV[2]))
redis.call('EXPIRE', KEYS[2], tonumber(ARGV[2]) * 2)
local replicas = redis.call('ZCARD', KEYS[2])

local function exact(number) return string.format('%.17g', number) end

local state = redis.call('HMGET', KEYS[1], 'requests', 'requests_at', 'tokens', 'tokens_at', 'full_at')
local buckets, wait = {}, 0
for i = 1, 2 do
  local at = 3 + (i - 1) * 5
  local rate, burst = tonumber(ARGV[at]) / 60, tonumber(ARGV[at + 1])
  if rate > 0 then
    local level = tonumber(state[2 * i - 1]) or burst
    local elapsed = math.max(0, now - (tonumber(state[2 * i]) or now))
    level = math.min(burst, level + elapsed * rate) - tonumber(ARGV[at + 2])
    local short = math.min(tonumber(ARGV[at + 3]), burst) - level
    if short > 0.000001 then wait = math.max(wait, short / rate) end
    buckets[i] = {rate = rate, burst = burst, level = level, take = tonumber(ARGV[at + 4])}
  end
end
local levels, rest = {'0', '0'}, math.max(0, (tonumber(state[5]) or 0) - now)
for i = 1, 2 do
  local bucket = buckets[i]
  if bucket then
    if wait == 0 then bucket.level = bucket.level - bucket.take end
    levels[i] = exact(bucket.level)
    rest = math.max(rest, (bucket.burst - bucket.level) / bucket.rate)
    local name = i == 1 and 'requests' or 'tokens'
    redis.call('HSET', KEYS[1], name, levels[i], name .. '_at', exact(now))
  end
end
if next(buckets) then
  redis.call('HSET', KEYS[1], 'full_at', exact(now + rest))
  redis.call('EXPIRE', KEYS[1], math.ceil(rest) + 1)
end
return {exact(wait), levels[1], levels[2], replicas}
""")
"""Takes requests and tokens together or not at all. Arguments per bucket: rate per minute (0: unlimited), burst, the
amount owed in any case, the amount that must be available, the amount then taken. Each bucket has its own time, and one
that a question is not about stays as it is: replicas may limit one name by different kinds. Untouched buckets expire
once both are full again: an absent bucket is a full one. The server's clock decides; a jump back counts as no time
elapsed."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Amounts of (requests, tokens): `owed` is taken whatever the verdict, `need` must be available, and `take` is then
    taken."""

    owed: tuple[float, float]
    need: tuple[float, float]
    take: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wait`: seconds until the demand can be met; 0 if it was met and taken. `requests` and `tokens` are the bucket
    levels afterwards."""

    wait: float
    requests: float
    tokens: float


class SharedLimits:
    """Limits by name at `url`. `timeout`: seconds a question may wait for the server. `workers`: the processes known to
    share the limits before any has been counted. The constructor raises `ValueError` for an invalid URL; nothing else
    is ever raised."""

    def __init__(
        self,
        url: str,
        timeout: float,
        clock: Clock,
        metrics: Metrics,
        *,
        workers: int = 1,
    ) -> None:
        self._timeout = timeout
        self._link = Link(url, _MAX_CONNECTIONS, clock.monotonic)
        self._outage = Outage(clock.monotonic)
        self._workers = self.replicas = workers
        self._coalescer: Coalescer[list[bytes], Verdict | None] = Coalescer(
            self._answer, None, _BATCH, _MAX_CONNECTIONS, lambda _: timeout, self._late
        )
        self._operations = partial(metrics.cache_operations.labels, "redis", "limit")
        """The series of a result."""
        self._ok = self._operations("ok")

    async def open(self) -> None:
        """Announces this replica to the others. Never fails."""
        await self.ask(b"none", Limit(None, None), Demand((0, 0), (0, 0), (0, 0)))

    async def close(self) -> None:
        await self._coalescer.close()
        await self._link.close()

    async def ask(self, name: bytes, limit: Limit, demand: Demand) -> Verdict | None:
        """None if no answer came in time; the server may have taken the amounts all the same."""
        arguments = [b"2", PREFIX + name, PREFIX + b"replicas", self._link.replica, b"%d" % REPLICA_TTL]
        for i, bucket in enumerate((limit.requests, limit.tokens)):
            arguments += _encode_bucket(bucket, demand.owed[i], demand.need[i], demand.take[i])
        return await self._coalescer.ask(arguments)

    async def _answer(self, questions: list[list[bytes]]) -> Sequence[Verdict | None]:
        """Asks all questions in one round trip."""
        exchange = partial(_SCRIPT.run, self._link.connections, questions)
        replies = await self._link.ask(exchange, self._timeout, _refusal)
        if isinstance(replies, Failure):
            self._operations(replies.result).inc(len(questions))
            if replies.error is not None:
                self._alone(replies.error)
            return [None] * len(questions)
        verdicts = [self._verdict(reply) for reply in replies]
        refused = 0 if all(verdicts) else verdicts.count(None)
        self._ok.inc(len(verdicts) - refused)
        if refused:
            self._operations("error").inc(refused)
            self._alone(_error(replies[verdicts.index(None)]))
        elif self._outage.recovered():
            log.warning("redis limits: shared by the replicas again")
        return verdicts

    def _late(self, questions: list[list[bytes]]) -> None:
        self._operations("skipped").inc(len(questions))

    def _verdict(self, reply: object) -> Verdict | None:
        """None if the reply is not a verdict. The replies for other names may still be."""
        if not isinstance(reply, list):
            return None
        try:
            wait, requests, tokens, replicas = reply
            numbers = float(wait), float(requests), float(tokens)
            sharers = int(replicas)
        except (ValueError, TypeError):
            return None
        if not all(map(math.isfinite, numbers)):
            return None
        self.replicas = max(sharers, self._workers)
        return Verdict(*numbers)

    def _alone(self, error: Exception) -> None:
        if self._outage.failing(why := describe_error(error)):
            log.warning("redis limits: each of %d replicas keeps its own part of them: %s", self.replicas, why)


def _refusal(replies: list[object]) -> Exception | None:
    """The server runs the script for none of the questions."""
    for reply in replies:
        if isinstance(reply, list):
            return None
    return _error(replies[0])


def _error(reply: object) -> Exception:
    return reply if isinstance(reply, Exception) else ValueError("not a script's reply")


def _encode_bucket(bucket: Bucket | None, *amounts: float) -> list[bytes]:
    rate_and_burst = (bucket.per_minute, bucket.burst) if bucket else (0.0, 0.0)
    return [b"%.17g" % number for number in (*rate_and_burst, *amounts)]
