"""Claims: how replicas tell each other, over a real Redis, what they are embedding."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis.asyncio
from redis.exceptions import NoScriptError

from app.cache.build import stores
from app.cache.connections import Command
from app.cache.redis import ALIVE_PREFIX, CLAIM_PREFIX, PREFIX, RedisStore
from app.cache.store import CLAIM_TTL
from app.cache.tiers import Tiers
from app.config import CacheSettings
from app.metrics import Metrics
from tests.cache.support import LIMIT, Clock, count, embedding, entries, key, until
from tests.redis_server import RedisServer


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def store(server: RedisServer, clock: Clock, metrics: Metrics | None = None) -> RedisStore:
    """The Redis tier of one replica."""
    return RedisStore(server.url, LIMIT, 60, clock, metrics or Metrics())


async def close(*stores: RedisStore) -> None:
    await asyncio.gather(*(each.close() for each in stores))


async def test_what_one_misses_is_held_for_the_others_until_it_is_there(server: RedisServer, clock: Clock) -> None:
    metrics = Metrics()
    one, other = store(server, clock), store(server, clock, metrics)
    assert await one.get_or_claim(keys(1, 2)) == ([None, None], set())
    assert await other.get_or_claim(keys(2, 3)) == ([None, None], {key(2)})
    assert count(metrics, "redis", "get", "held") == 1
    assert count(metrics, "redis", "get", "miss") == 1
    await one.put(entries([2]))
    assert await other.get_or_claim(keys(2, 1)) == ([embedding(2), None], {key(1)})
    await close(one, other)


async def test_nobody_waits_for_what_the_server_has_thrown_out_again(server: RedisServer, clock: Clock) -> None:
    one, other = store(server, clock), store(server, clock)
    await one.get_or_claim(keys(1, 2))
    await one.put(entries([1]))
    async with redis.asyncio.Redis.from_url(server.url) as admin:
        assert await admin.delete(PREFIX + key(1)) == 1  # as a full server evicts it
    assert await other.get_or_claim(keys(1, 2)) == ([None, None], {key(2)})
    await close(one, other)


async def test_of_many_keys_the_right_ones_are_held(server: RedisServer, clock: Clock) -> None:
    one, other = store(server, clock), store(server, clock)
    await one.put(entries([290]))
    await one.get_or_claim(keys(*range(5, 300, 7)))
    found, held = await other.get_or_claim(keys(*range(300)))
    assert held == set(keys(*range(5, 300, 7)))
    assert [i for i, each in enumerate(found) if each] == [290]
    await close(one, other)


async def test_nobodys_own_claim_holds_it_up(server: RedisServer, clock: Clock) -> None:
    one = store(server, clock)
    for _ in range(2):
        assert await one.get_or_claim(keys(1)) == ([None], set())
    await close(one)


async def test_a_plain_look_up_claims_nothing_and_sees_no_claim(server: RedisServer, clock: Clock) -> None:
    one, other = store(server, clock), store(server, clock)
    assert await one.get(keys(1)) == [None]
    assert await other.get_or_claim(keys(1)) == ([None], set())
    assert await one.get(keys(1)) == [None]
    await close(one, other)


async def test_what_is_let_go_is_the_next_ones(server: RedisServer, clock: Clock) -> None:
    one, other, third = (store(server, clock) for _ in range(3))
    await one.get_or_claim(keys(1, 2))
    await one.release_claims(keys(1))
    assert await other.get_or_claim(keys(1, 2)) == ([None, None], {key(2)})
    await one.release_claims(keys(1))  # no longer its own
    assert await third.get_or_claim(keys(1)) == ([None], {key(1)})
    await close(one, other, third)


async def test_a_claim_ends_by_itself(server: RedisServer, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = store(server, clock), store(server, clock)
    monkeypatch.setattr("app.cache.redis.CLAIM_TTL", 0.2)
    await one.get_or_claim(keys(1))
    assert await other.get_or_claim(keys(1)) == ([None], {key(1)})

    async def free() -> bool:
        return await other.get_or_claim(keys(1)) == ([None], set())

    await until(free)
    await close(one, other)


async def test_a_claim_lasts_as_long_as_a_request_may(server: RedisServer, clock: Clock, metrics: Metrics) -> None:
    settings = CacheSettings.model_validate({"memory": None, "redis": {"url": server.url, "timeout": LIMIT}})
    request_timeout = 600.0
    (one,) = stores(settings, lambda: request_timeout, metrics, clock)
    assert isinstance(one, RedisStore)
    await one.get_or_claim(keys(1))
    request_timeout = 900.0  # as by a reload
    await one.get_or_claim([key(2)])
    async with redis.asyncio.Redis.from_url(server.url) as admin:
        assert 590_000 < await admin.pttl(CLAIM_PREFIX + key(1)) <= 600_000
        assert 890_000 < await admin.pttl(CLAIM_PREFIX + key(2)) <= 900_000
    await close(one)


async def test_claims_last_while_their_replica_says_that_it_lives(
    server: RedisServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, third = (store(server, clock) for _ in range(3))
    monkeypatch.setattr("app.cache.redis.CLAIM_TTL", 0.3)
    await one.get_or_claim(keys(1, 2))
    end = asyncio.get_running_loop().time() + 1.0
    while asyncio.get_running_loop().time() < end:
        assert await other.get_or_claim(keys(1, 2)) == ([None, None], set(keys(1, 2)))
        await one.renew_claims()
        await asyncio.sleep(0.05)  # for three times as long as a claim lasts by itself

    async def free() -> bool:
        return await other.get_or_claim(keys(1)) == ([None], set())

    await until(free)  # once it has stopped renewing them
    assert await third.get_or_claim(keys(1, 2)) == ([None, None], {key(1)}), "the next owner's"
    await close(one, other, third)


async def test_of_many_who_miss_at_once_each_key_is_one_replicas(server: RedisServer, clock: Clock) -> None:
    replicas = [store(server, clock) for _ in range(4)]
    wanted = keys(*range(50))
    rounds = [(replica, wanted[i % 7 :: 1 + i % 3]) for replica in replicas for i in range(8)]

    async def claimed(replica: RedisStore, asked: list[bytes]) -> set[tuple[bytes, int]]:
        _, held = await replica.get_or_claim(asked)
        return {(each, id(replica)) for each in asked if each not in held}

    owners = set().union(*await asyncio.gather(*(claimed(*each) for each in rounds)))
    assert len(owners) == len(wanted)
    assert {each for each, _ in owners} == set(wanted)
    await close(*replicas)


async def test_a_server_that_has_forgotten_the_script_is_told_again(server: RedisServer, clock: Clock) -> None:
    one, other = store(server, clock), store(server, clock)
    await one.get_or_claim(keys(1))
    await one._connections.exchange([(b"SCRIPT", b"FLUSH")])
    await one.put(entries([3]))
    assert await other.get_or_claim(keys(1, 3)) == ([None, embedding(3)], {key(1)})
    await close(one, other)


async def test_what_is_written_while_the_server_is_sent_its_script_again_is_found(
    server: RedisServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = store(server, clock), store(server, clock)
    await one.get_or_claim(keys(1))
    await one._connections.exchange([(b"SCRIPT", b"FLUSH")])
    exchange = other._connections.exchange

    async def then_it_is_written(commands: Sequence[Command]) -> list[object]:
        replies = await exchange(commands)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            await one.put(entries([1]))
        return replies

    monkeypatch.setattr(other._connections, "exchange", then_it_is_written)
    assert await other.get_or_claim(keys(1)) == ([embedding(1)], set())
    await close(one, other)


async def test_what_is_no_value_of_ours_is_nobodys_to_wait_for(server: RedisServer, clock: Clock) -> None:
    one, other = store(server, clock), store(server, clock)
    await one._connections.exchange([(b"SET", b"eg:1:" + key(1), b"garbage")])
    for replica in (one, other):
        assert await replica.get_or_claim(keys(1)) == ([None], set())
    await close(one, other)


async def test_a_claim_names_no_text_and_is_of_no_size(server: RedisServer, clock: Clock) -> None:
    one = store(server, clock)
    await one.get_or_claim(keys(1))
    (names, value) = await one._connections.exchange([(b"KEYS", b"*"), (b"GET", CLAIM_PREFIX + key(1))])
    assert isinstance(value, bytes)
    assert len(value) == 16
    assert isinstance(names, list)
    assert sorted(names) == sorted([CLAIM_PREFIX + key(1), ALIVE_PREFIX + value])
    assert await one._connections.exchange([(b"GET", ALIVE_PREFIX + value)]) == [b""]
    await close(one)


@pytest.mark.parametrize(
    "options", [("--rename-command", "EVALSHA", ""), ("--maxmemory", "1", "--maxmemory-policy", "noeviction")]
)
async def test_where_claims_are_refused_everybody_embeds_and_it_is_said_once(
    clock: Clock, caplog: pytest.LogCaptureFixture, options: tuple[str, ...]
) -> None:
    metrics = Metrics()
    with RedisServer(*options) as server, caplog.at_level(logging.WARNING):
        one, other = store(server, clock, metrics), store(server, clock)
        for _ in range(3):
            assert await one.get_or_claim(keys(1)) == ([None], set())
        assert await other.get_or_claim(keys(1)) == ([None], set())
        assert one.status.startswith("up; claims fail: ")
        assert count(metrics, "redis", "claim", "error") == 1, "then it is left alone for a while"
        assert count(metrics, "redis", "get", "miss") == 3
        assert sum("claim fails" in record.message for record in caplog.records) == 2, "each says it once"
        clock.advance(6)
        await one.get_or_claim(keys(1))
        assert count(metrics, "redis", "claim", "error") == 2
        await close(one, other)


async def test_claims_work_again_once_the_server_takes_them(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with (
        RedisServer("--maxmemory", "1", "--maxmemory-policy", "noeviction") as server,
        caplog.at_level(logging.WARNING),
    ):
        one, other = store(server, clock), store(server, clock)
        await one.get_or_claim(keys(1))
        await one._connections.exchange([(b"CONFIG", b"SET", b"maxmemory", b"0")])
        clock.advance(6)
        await one.get_or_claim(keys(1))
        assert one.status == "up"
        assert "claim works again" in caplog.text
        assert await other.get_or_claim(keys(1)) == ([None], {key(1)})
        await close(one, other)


async def test_a_server_that_is_away_holds_nothing(clock: Clock, metrics: Metrics) -> None:
    with RedisServer() as server:
        one, other = store(server, clock), store(server, clock, metrics)
        await one.get_or_claim(keys(1))
        await one.close()
        server.kill()
        answers: list[Any] = [await other.get_or_claim(keys(1)) for _ in range(4)]
        assert answers == [([None], ())] * 4
        await other.release_claims(keys(1))
        assert other.status.startswith("down: ")
        await other.close()


async def test_what_is_there_is_not_claimed(server: RedisServer, clock: Clock) -> None:
    one = store(server, clock)
    await one.put(entries([1]))
    assert await one.get_or_claim(keys(1)) == ([embedding(1)], set())
    assert await one._connections.exchange([(b"EXISTS", CLAIM_PREFIX + key(1))]) == [0]
    await close(one)


async def test_what_is_not_written_yet_is_not_embedded_by_its_own_replica_once_more(
    server: RedisServer, clock: Clock
) -> None:
    tiers, asked = Tiers([store(server, clock)], Metrics(), clock), keys(*range(1000))
    assert not any((await tiers.get_or_claim(asked))[0])
    tiers.put(entries(range(1000)))
    assert all((await tiers.get_or_claim(asked))[0])
    await asyncio.sleep(0)
    assert all((await tiers.get_or_claim(asked))[0]), "nor while the first of them are being written"
    await tiers.close()


async def test_nobody_is_told_of_what_others_wait_for_who_asked_in_the_same_turn(
    server: RedisServer, clock: Clock
) -> None:
    one, metrics = store(server, clock), Metrics()
    await one.get_or_claim(keys(1))
    tiers = Tiers([store(server, clock, metrics)], metrics, clock)
    answers = await asyncio.gather(*(tiers.get_or_claim(keys(number)) for number in (1, 2)))
    assert [held for _, held in answers] == [{key(1)}, set()]
    await tiers.close()
    await close(one)


@pytest.mark.parametrize("turns", range(1, 12))
async def test_who_hangs_up_during_the_look_up_holds_nothing(server: RedisServer, clock: Clock, turns: int) -> None:
    tiers, other = Tiers([store(server, clock)], Metrics(), clock), store(server, clock)
    await tiers.open()
    for number in range(10):
        asking = asyncio.create_task(tiers.get_or_claim(keys(number)))
        for _ in range(turns):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        if not asking.cancelled():
            continue  # it had its answer already

        async def free(number: int = number) -> bool:
            return await other.get_or_claim(keys(number)) == ([None], set())

        async with asyncio.timeout(CLAIM_TTL - 1):
            await until(free)
    await tiers.close()
    await close(other)


async def test_what_others_asked_for_in_the_same_look_up_stays_theirs(server: RedisServer, clock: Clock) -> None:
    tiers, other = Tiers([store(server, clock)], Metrics(), clock), store(server, clock)
    await tiers.open()
    gone, there = (asyncio.create_task(tiers.get_or_claim(keys(*asked))) for asked in ((1, 2), (2, 3)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # both have asked now
    gone.cancel()
    assert await there == ([None, None], set())

    async def free() -> bool:
        return await other.get_or_claim(keys(1)) == ([None], set())

    async with asyncio.timeout(CLAIM_TTL - 1):
        await until(free)
    assert await other.get_or_claim(keys(2, 3)) == ([None, None], set(keys(2, 3)))
    await tiers.close()
    await close(other)
