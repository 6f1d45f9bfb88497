"""A caller's limits, by a clock moved by hand; with a real Redis for several processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
from redis import Redis

from app.cache.shared_limits import PREFIX, SharedLimits, Verdict
from app.errors import GatewayError, InvalidRequest, RateLimited
from app.limits import MAX_DEBT, Rates
from app.metrics import Metrics
from app.pipeline.quota import Quota
from tests.cache.support import LIMIT
from tests.clock import HandClock, settle
from tests.redis_server import RedisServer


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def quota(clock: HandClock, requests: int | None = None, tokens: int | None = None, processes: int = 1) -> Quota:
    return Quota("team", Rates(requests, tokens), clock, Metrics(), processes=processes)


async def refusal(quota: Quota, tokens: int = 1) -> RateLimited:
    with pytest.raises(RateLimited) as refused:
        await quota.take(tokens)
    assert refused.value.retry_after is not None
    return refused.value


async def test_a_minutes_worth_goes_at_once_and_then_one_at_a_time(clock: HandClock) -> None:
    limited = quota(clock, requests=30)
    for _ in range(30):
        await limited.take(1)
    told = await refusal(limited, tokens=5)
    assert told.retry_after == pytest.approx(2)
    assert "30 requests per minute; try again" in told.message
    await clock.advance(2)
    await limited.take(1)
    await refusal(limited)


async def test_who_waits_as_long_as_told_is_let_in(clock: HandClock) -> None:
    limited = quota(clock, requests=7, tokens=1000)
    await limited.take(800)
    told = await refusal(limited, tokens=700)
    assert "1000 tokens per minute" in told.message
    assert "about 700" in told.message
    assert told.retry_after is not None
    await clock.advance(told.retry_after)
    await limited.take(700)


async def test_what_is_refused_costs_nothing(clock: HandClock) -> None:
    limited = quota(clock, requests=10, tokens=100)
    await limited.take(60)
    for _ in range(50):
        await refusal(limited, tokens=60)
    await limited.take(40)
    requests, tokens = limited.limit_statuses()
    assert (requests.limit, requests.remaining) == (10, 8)
    assert (tokens.limit, tokens.remaining) == (100, 0)
    assert requests.reset == pytest.approx(12)
    assert tokens.reset == pytest.approx(60)


async def test_more_than_a_minute_allows_is_the_callers_mistake(clock: HandClock) -> None:
    limited = quota(clock, requests=2, tokens=100)
    with pytest.raises(InvalidRequest, match="about 101 tokens, more than the 100 tokens per minute") as refused:
        await limited.take(101)
    assert (refused.value.status, refused.value.param) == (400, "input")
    await limited.take(100)
    await clock.advance(29)
    await refusal(limited)  # it counts as a request


async def test_an_estimate_is_put_right_afterwards(clock: HandClock) -> None:
    limited = quota(clock, tokens=100)
    await limited.take(80)
    limited.adjust(0, -70)
    await limited.take(90)
    limited.adjust(0, 50)
    assert (await refusal(limited)).retry_after == pytest.approx(51 * 0.6)
    assert limited.limit_statuses()[0].remaining == 0


async def test_a_process_of_several_keeps_its_part(clock: HandClock) -> None:
    limited = quota(clock, requests=40, tokens=100, processes=4)
    for _ in range(10):
        await limited.take(1)
    assert (await refusal(limited)).retry_after == pytest.approx(6)
    await clock.advance(60)
    await limited.take(100)  # more than its share's burst: admitted when that is full, and paid off afterwards
    assert (await refusal(limited)).retry_after == pytest.approx(76 / 25 * 60)


# --- shared over Redis ----------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


class Process:
    """One gateway process's part in a caller's limit."""

    def __init__(self, server: RedisServer, clock: HandClock, requests: int | None, tokens: int | None = None) -> None:
        self.metrics = Metrics()
        self.shared = SharedLimits(server.url, LIMIT, clock, self.metrics)
        self.quota = Quota("team", Rates(requests, tokens), clock, Metrics(), self.shared)

    def asked(self, result: str = "ok") -> float:
        labels = {"tier": "redis", "operation": "limit", "result": result}
        return self.metrics.registry.get_sample_value("embedding_gateway_cache_operations_total", labels) or 0

    async def admitted(self, tokens: int = 1) -> bool:
        try:
            await self.quota.take(tokens)
        except GatewayError:
            return False
        return True


async def test_processes_keep_one_limit_together(server: RedisServer, clock: HandClock) -> None:
    processes = [Process(server, clock, requests=3) for _ in range(3)]
    admitted = await asyncio.gather(*(each.admitted() for each in processes for _ in range(3)))
    assert sum(admitted) == 3
    for each in processes:
        await each.shared.close()


async def test_of_a_large_limit_redis_hears_now_and_then(server: RedisServer, clock: HandClock) -> None:
    one, other = (Process(server, clock, requests=10_000, tokens=1_000_000) for _ in range(2))
    await other.shared.open()
    assert all([await one.admitted(10) for _ in range(51)])
    assert one.asked() == 1, "its part of a hundredth are 50"
    assert one.quota.limit_statuses()[0].remaining == 10_000 - 51
    assert await one.admitted(10)
    assert one.asked() == 2
    assert all([await one.admitted(10) for _ in range(20)])
    await clock.advance(0.11)
    assert await one.admitted(10)
    assert one.asked() == 3, "what the others have used in a tenth of a second is asked for"
    assert await other.admitted(10)
    assert other.quota.limit_statuses()[0].remaining == pytest.approx(10_000 - 74, abs=20), "it has heard of all"
    assert await one.admitted(5_100)
    assert one.asked() == 4, "more tokens than its part"
    await one.shared.close()
    await other.shared.close()


async def test_of_the_end_of_a_large_limit_redis_hears_each_time(server: RedisServer, clock: HandClock) -> None:
    one = Process(server, clock, requests=1_000)
    while one.quota.limit_statuses()[0].remaining > 8:  # under a hundredth of the limit
        assert await one.admitted()
    asked = one.asked()
    assert asked < 200
    assert all([await one.admitted() for _ in range(3)])
    assert one.asked() == asked + 3
    await one.shared.close()


async def test_all_processes_together_let_in_a_hundredth_too_much_at_most(
    server: RedisServer, clock: HandClock
) -> None:
    began = time.monotonic()
    processes = [Process(server, clock, requests=3_000) for _ in range(3)]
    for each in processes:
        await each.shared.open()

    async def flood(process: Process) -> int:
        return sum([await process.admitted() for _ in range(3_000)])

    admitted = sum(await asyncio.gather(*(flood(each) for each in processes)))
    back = 3_000 / 60 * (time.monotonic() - began) + 1
    assert 3_000 <= admitted <= 3_030 + back
    assert sum(each.asked() for each in processes) < 1_000
    for each in processes:
        await each.shared.close()


async def test_what_is_surely_over_the_limit_is_refused_without_asking(server: RedisServer, clock: HandClock) -> None:
    one = Process(server, clock, requests=2)
    for _ in range(100):
        await one.admitted()
    with pytest.raises(RateLimited):
        one.quota.admit(0)
    assert one.asked() == 2
    await one.shared.close()


async def test_debt_that_somebody_left_in_redis_is_forgotten_once_it_is_deleted_there(
    server: RedisServer, clock: HandClock
) -> None:
    one = Process(server, clock, requests=60, tokens=600)
    with Redis.from_url(server.url) as client:
        name = PREFIX + b"caller:team"
        client.hset(name, mapping={"requests": "-1e15", "tokens": "-1e15"})
        assert not await one.admitted()
        client.delete(name)
        assert not await one.admitted(), "it is not asked"
        await clock.advance(60 * (MAX_DEBT + 1))
        assert await one.admitted()
    await one.shared.close()


async def test_what_one_process_puts_right_the_others_hear_of_with_its_next_request(
    server: RedisServer, clock: HandClock
) -> None:
    one, other = (Process(server, clock, None, tokens=4) for _ in range(2))
    assert await one.admitted(1)
    one.quota.adjust(0, 2)
    assert await one.admitted(1)
    assert not await other.admitted(1)
    assert other.quota.limit_statuses()[0].remaining == 0
    await one.shared.close()
    await other.shared.close()


async def test_a_large_correction_is_told_at_once(server: RedisServer, clock: HandClock) -> None:
    one, other, third = (Process(server, clock, None, tokens=1_000) for _ in range(3))
    await other.shared.open()
    assert await one.admitted(100)
    one.quota.adjust(0, 5)
    assert not one.quota._asking, "no more than its part of a hundredth"
    one.quota.adjust(0, 795)
    await asyncio.gather(*one.quota._asking)
    assert one.asked() == 2
    assert not await other.admitted(200)
    assert other.quota.limit_statuses()[0].remaining == pytest.approx(100, abs=50)
    one.quota.adjust(0, -700)
    await asyncio.gather(*one.quota._asking)
    assert await third.admitted(600), "what is given back as well"
    for each in (one, other, third):
        await each.shared.close()


async def test_without_redis_each_process_lets_in_its_part_of_what_is_left_and_says_so_later(
    server: RedisServer, clock: HandClock
) -> None:
    one, other = Process(server, clock, requests=9), Process(server, clock, requests=9)
    await one.shared.open()
    assert await other.admitted()
    assert await one.admitted()
    server.kill()
    assert [await one.admitted() for _ in range(6)] == [True] * 3 + [False] * 3, "7 of 9 are left, for two"
    assert one.quota.limit_statuses()[0].limit == 9
    server.start()
    await clock.advance(60)
    assert await one.admitted(), "Redis has forgotten all, but is told of three"
    assert one.quota.limit_statuses()[0].remaining == 5
    await one.shared.close()
    await other.shared.close()


class Slow:
    """In place of `SharedLimits`: answers what it is told to, once `go` is set."""

    replicas = 1

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.go = asyncio.Event()
        self.answer: Verdict | None = None

    async def ask(self, key: str, limit: object, ask: Any) -> Verdict | None:
        self.asked.append(ask.owed)
        await self.go.wait()
        return self.answer


async def test_of_who_hangs_up_while_redis_is_asked_it_hears_once(clock: HandClock) -> None:
    slow = Slow()
    slow.answer = Verdict(0, 49, 99)
    limited = Quota("team", Rates(50, 1000), clock, Metrics(), cast("SharedLimits", slow))
    limited.adjust(0, 900)
    gone = asyncio.create_task(limited.take(1))
    await settle()
    gone.cancel()
    await settle()
    limited.adjust(2, 9)
    slow.go.set()
    await settle()
    left = [each.remaining for each in limited.limit_statuses()]
    assert left == [47, 90], "the answer is taken in all the same, less what it does not know of"
    await clock.advance(1)
    await limited.take(1)
    assert slow.asked == [(0, 900), (0, 0), (2, 9)]
    assert not limited._asking, "what is over is kept no longer"


async def test_what_redis_may_have_heard_is_not_given_back_again(clock: HandClock) -> None:
    slow = Slow()
    slow.go.set()
    limited = Quota("team", Rates(None, 1000), clock, Metrics(), cast("SharedLimits", slow))
    for owed, heard in ((-500, -500), (100, 101)):  # the last request counts as well: Redis has not answered it
        limited.adjust(0, owed)
        await limited.take(1)
        assert slow.asked.pop() == (0, 0)
        assert slow.asked.pop() == (0, heard)
    await limited.take(1)
    assert slow.asked.pop() == (0, 102), "and a debt is told again: rather too strict than too lax"
