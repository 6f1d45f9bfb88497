"""Limits that several replicas share in a real Redis. The rates are too low for a slow machine to matter."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import redis.asyncio

from app.cache.shared_limits import PREFIX, Demand, SharedLimits, Verdict
from app.limits import Bucket, Limit
from app.metrics import Metrics
from tests.cache.support import LIMIT, Clock
from tests.clock import settle
from tests.redis_server import RedisServer

Replica = Callable[..., SharedLimits]
ONE = Demand((0, 0), (1, 1), (1, 1))


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest_asyncio.fixture
async def replica(server: RedisServer, clock: Clock, metrics: Metrics) -> AsyncIterator[Replica]:
    """Builds the limits of gateway replicas, and closes them at the end."""
    built = []

    def build(timeout: float = LIMIT, workers: int = 1) -> SharedLimits:
        built.append(SharedLimits(server.url, timeout, clock, metrics, workers=workers))
        return built[-1]

    yield build
    for each in built:
        await each.close()


@pytest_asyncio.fixture
async def client(server: RedisServer) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.from_url(server.url) as client:
        yield client


def limit(requests: float | None = 5, tokens: float | None = None) -> Limit:
    """Bursts of this size that refill at one a minute."""
    return Limit(Bucket(1, requests, 0) if requests else None, Bucket(1, tokens, 0) if tokens else None)


def lead(name: Path, server: RedisServer) -> None:
    name.unlink(missing_ok=True)
    name.symlink_to(server.socket_url.removeprefix("unix://"))


async def must(shared: SharedLimits, name: bytes, limit: Limit, ask: Demand = ONE) -> Verdict:
    verdict = await shared.ask(name, limit, ask)
    assert verdict is not None
    return verdict


async def test_replicas_that_ask_at_once_get_the_limit_and_not_one_more(replica: Replica) -> None:
    replicas = [replica() for _ in range(3)]
    asked = [must(each, b"a", limit(requests=20)) for each in replicas for _ in range(30)]
    verdicts = await asyncio.gather(*asked)
    assert sum(verdict.wait == 0 for verdict in verdicts) == 20
    assert all(0 < verdict.wait <= 60 for verdict in verdicts if verdict.wait)


async def test_questions_of_one_turn_are_one_round_trip(replica: Replica, client: redis.asyncio.Redis) -> None:
    shared = replica()
    before = (await client.info("stats"))["total_connections_received"]
    verdicts = await asyncio.gather(*(must(shared, b"%d" % (i % 3), limit(requests=5)) for i in range(20)))
    assert (await client.info("stats"))["total_connections_received"] - before == 1
    let_in = [[verdict.wait == 0 for verdict in verdicts[name::3]] for name in range(3)]
    assert let_in == [[True] * 5 + [False] * 2, [True] * 5 + [False] * 2, [True] * 5 + [False]]
    await client.script_flush()
    again = await asyncio.gather(*(must(shared, b"%d" % i, limit(requests=5)) for i in range(4)))
    assert [verdict.wait == 0 for verdict in again] == [False, False, False, True]


async def test_a_name_that_cannot_be_asked_for_spoils_no_others_verdict(
    replica: Replica, client: redis.asyncio.Redis, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    shared = replica()
    await client.set(PREFIX + b"bad", "of another type")
    verdicts = await asyncio.gather(*(shared.ask(name, limit(), ONE) for name in (b"a", b"bad", b"c")))
    assert [verdict and verdict.wait for verdict in verdicts] == [0, None, 0]
    assert "WRONGTYPE" in caplog.text
    labels = {"tier": "redis", "operation": "limit"}
    counted = [
        metrics.registry.get_sample_value("embedding_gateway_cache_operations_total", labels | {"result": result})
        for result in ("ok", "error")
    ]
    assert counted == [2, 1]


async def test_who_hangs_up_at_once_has_taken_nothing_and_nobody_elses_answer(replica: Replica) -> None:
    shared = replica()
    for turns, left in ((1, 7), (2, 4)):
        asking = [asyncio.create_task(shared.ask(b"%d" % turns, limit(requests=10), ONE)) for _ in range(5)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for each in asking[:3]:
            each.cancel()
        async with asyncio.timeout(LIMIT):
            verdicts = await asyncio.gather(*asking[3:])
            assert all(verdict is not None and verdict.wait == 0 for verdict in verdicts)
            last = await must(shared, b"%d" % turns, limit(requests=10))
        # A request that had been sent counts: the server's count cannot be taken back.
        assert last.requests == pytest.approx(left, abs=0.1)


async def test_two_names_are_two_limits(replica: Replica) -> None:
    shared = replica()
    assert (await must(shared, b"a", limit(requests=1))).wait == 0
    assert (await must(shared, b"a", limit(requests=1))).wait > 0
    assert (await must(shared, b"b", limit(requests=1))).wait == 0


async def test_requests_and_tokens_are_taken_together_or_not_at_all(replica: Replica) -> None:
    shared = replica()
    both = limit(requests=5, tokens=100)
    verdict = await must(shared, b"a", both, Demand((0, 0), (1, 60), (1, 60)))
    assert (verdict.wait, verdict.requests, verdict.tokens) == (0, 4, 40)
    refused = await must(shared, b"a", both, Demand((0, 0), (1, 60), (1, 60)))
    assert 19 * 60 < refused.wait <= 20 * 60
    assert refused.requests == pytest.approx(4, abs=1)
    assert refused.tokens == pytest.approx(40, abs=1)
    assert (await must(shared, b"a", both, Demand((0, 0), (1, 40), (1, 40)))).wait == 0


async def test_what_is_owed_is_charged_whatever_the_verdict(replica: Replica) -> None:
    shared = replica()
    verdict = await must(shared, b"a", limit(requests=5), Demand((7, 0), (1, 0), (1, 0)))
    assert 2 * 60 < verdict.wait <= 3 * 60
    assert verdict.requests == pytest.approx(-2, abs=0.1)
    assert (await must(shared, b"a", limit(requests=5), Demand((-4, 0), (1, 0), (1, 0)))).wait == 0


async def test_it_fills_by_the_servers_clock(replica: Replica, client: redis.asyncio.Redis) -> None:
    shared = replica()  # its own clock stands still, years off
    before = await client.time()
    for _ in range(5):
        await must(shared, b"a", limit())
    assert (await must(shared, b"a", limit())).wait > 0
    at = float((await client.hget(PREFIX + b"a", "requests_at")) or 0)
    assert before[0] <= at < (await client.time())[0] + 1
    await client.hset(PREFIX + b"a", "requests_at", repr(at - 90))
    assert (await must(shared, b"a", limit())).wait == 0
    assert 0 < (await must(shared, b"a", limit())).wait <= 30
    await client.hset(PREFIX + b"a", "requests_at", repr(at + 10**6))
    assert 0 < (await must(shared, b"a", limit())).wait <= 60, "a clock that was set back stands still"


async def test_a_question_about_one_kind_of_limit_leaves_the_other_as_it_is(
    replica: Replica, client: redis.asyncio.Redis
) -> None:
    """As in a rolling change of the configuration that adds or drops one."""
    old, new = replica(), replica()
    requests, tokens = limit(requests=5), limit(requests=None, tokens=100)
    for _ in range(5):
        await must(old, b"a", requests)
    at = float(await client.hget(PREFIX + b"a", "requests_at") or 0)
    await client.hset(PREFIX + b"a", "requests_at", repr(at - 90))
    lasts = await client.ttl(PREFIX + b"a")
    assert (await must(new, b"a", tokens)).tokens == 99
    assert await client.ttl(PREFIX + b"a") >= lasts - 1, "forgotten before it is full, it would be taken for full"
    assert (await must(old, b"a", requests)).requests == pytest.approx(0.5, abs=0.1), "what it has refilled is its own"
    assert 0 < (await must(old, b"a", requests)).wait <= 30
    assert (await must(new, b"a", tokens)).tokens == pytest.approx(98, abs=0.1)


async def test_nothing_stays_for_ever(replica: Replica, client: redis.asyncio.Redis) -> None:
    shared = replica()
    await must(shared, b"a", limit(requests=5))
    assert 0 < await client.ttl(PREFIX + b"a") <= 61
    await must(shared, b"a", limit(requests=5))
    assert 60 < await client.ttl(PREFIX + b"a") <= 121
    assert 0 < await client.ttl(PREFIX + b"replicas") <= 120
    assert sorted(await client.keys("*")) == [PREFIX + b"a", PREFIX + b"replicas"]


async def test_replicas_count_themselves_from_their_start(replica: Replica) -> None:
    first, second, third = replica(), replica(), replica(workers=8)
    await first.open()
    await second.open()
    assert (first.replicas, second.replicas) == (1, 2)
    await must(first, b"a", limit())
    assert first.replicas == 2
    await third.open()
    assert third.replicas == 8, "the workers of one machine are known beforehand"


async def test_a_server_that_has_lost_its_scripts_gets_this_one_again(
    replica: Replica, client: redis.asyncio.Redis
) -> None:
    shared = replica()
    await must(shared, b"a", limit())
    await client.script_flush()
    assert (await must(shared, b"a", limit())).requests == pytest.approx(3, abs=0.1)


async def test_without_an_answer_there_is_no_verdict_and_after_three_times_no_question(
    server: RedisServer, replica: Replica, clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    shared = replica()
    await must(shared, b"a", limit())
    server.kill()
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            assert await shared.ask(b"a", limit(), ONE) is None
    assert len(caplog.records) == 1

    def count(result: str) -> float:
        labels = {"tier": "redis", "operation": "limit", "result": result}
        return metrics.registry.get_sample_value("embedding_gateway_cache_operations_total", labels) or 0

    assert (count("ok"), count("error"), count("skipped")) == (1, 3, 7)
    server.start()
    clock.advance(1)
    for _ in range(2):
        assert (await must(shared, b"b", limit())).wait == 0
    assert caplog.text.count("shared by the replicas again") == 1


async def test_a_server_that_comes_and_goes_is_logged_once_a_minute(
    server: RedisServer, replica: Replica, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    shared = replica()
    for _ in range(3):
        server.kill()
        assert await shared.ask(b"a", limit(), ONE) is None
        server.start()
        await must(shared, b"a", limit())
    assert len(caplog.records) == 2
    server.kill()
    clock.advance(60)
    assert await shared.ask(b"a", limit(), ONE) is None
    assert len(caplog.records) == 3


async def test_a_server_that_has_become_a_replica_is_left_for_the_one_that_its_name_leads_to(
    server: RedisServer, clock: Clock, metrics: Metrics, client: redis.asyncio.Redis
) -> None:
    with RedisServer() as other, tempfile.TemporaryDirectory(prefix="eg-") as directory:
        name = Path(directory, "name")
        lead(name, server)
        shared = SharedLimits(f"unix://{name}", LIMIT, clock, metrics)
        await must(shared, b"a", limit())
        await client.replicaof("127.0.0.1", "1")
        lead(name, other)
        assert await shared.ask(b"a", limit(), ONE) is None
        assert (await must(shared, b"a", limit())).requests == pytest.approx(4, abs=0.1)
        await shared.close()


async def test_a_server_that_hangs_is_waited_for_as_long_as_told(
    server: RedisServer, replica: Replica, metrics: Metrics
) -> None:
    shared = replica(timeout=0.01)
    server.pause()
    try:
        assert await shared.ask(b"a", limit(), ONE) is None
    finally:
        server.resume()
    labels = {"tier": "redis", "operation": "limit", "result": "timeout"}
    assert metrics.registry.get_sample_value("embedding_gateway_cache_operations_total", labels) == 1


async def test_at_the_end_what_is_asked_has_no_answer(server: RedisServer, replica: Replica) -> None:
    shared = replica(timeout=LIMIT)
    await shared.open()
    server.pause()
    try:
        asking = asyncio.create_task(shared.ask(b"a", limit(), ONE))
        await settle()
        await shared.close()
        assert await asyncio.wait_for(asking, 1) is None
    finally:
        server.resume()


async def test_what_the_server_has_answered_while_this_process_was_at_other_work_counts(
    server: RedisServer, replica: Replica
) -> None:
    shared = replica(timeout=0.2)
    await shared.open()
    server.pause()
    asking = asyncio.create_task(shared.ask(b"a", limit(), ONE))
    for _ in range(9):
        await asyncio.sleep(0)
    server.resume()
    time.sleep(0.6)  # noqa: ASYNC251  # as where many large answers are written
    verdict = await asking
    assert verdict is not None
    assert verdict.wait == 0
