"""A healthy tier stays in use under any load: time that a request spends in our own queue says nothing about it."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from app.cache.coalescer import Coalescer, WeightedSemaphore
from app.cache.disk import DiskStore
from app.cache.redis import RedisStore
from app.cache.tiers import Tiers
from app.metrics import Metrics
from app.types import Embedding
from tests.cache.support import LIMIT, Clock, count, embedding, entries, key, listening, until
from tests.clock import settle
from tests.redis_server import RedisServer


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


async def test_what_redis_has_answered_while_this_process_was_at_other_work_is_found(
    clock: Clock, metrics: Metrics
) -> None:
    with RedisServer() as server:
        store = RedisStore(server.url, 0.2, 60, clock, metrics)
        await store.put(entries(range(300)))
        for asked in ([1], range(300)):
            looking = asyncio.create_task(store.get(keys(*asked)))
            for _ in range(5):
                await asyncio.sleep(0)
            time.sleep(0.6)  # noqa: ASYNC251  # as where many large answers are written
            assert await looking == [embedding(number) for number in asked]
        assert count(metrics, "redis", "get", "timeout") == 0
        await store.close()


def writing_when(written: asyncio.Event) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A Redis that takes 0.6 s for a lookup, which is a miss, and holds each write until `written` is set."""

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line == b"SET\r\n":
                await written.wait()
                writer.write(b"+OK\r\n")
            elif line == b"DEL\r\n":
                writer.write(b":0\r\n")
            elif line == b"MGET\r\n":
                await asyncio.sleep(0.6)  # more than half of what a lookup may take
                writer.write(b"*1\r\n$-1\r\n")

    return answers


async def test_waiting_for_one_of_our_own_connections_to_redis_is_not_waiting_for_redis(
    clock: Clock, metrics: Metrics
) -> None:
    written = asyncio.Event()
    async with listening(writing_when(written)) as port:
        store = RedisStore(f"redis://127.0.0.1:{port}", 1.0, 60, clock, metrics, max_connections=1)
        await store.get(keys(1))
        writing = asyncio.create_task(store.put(entries([1])))
        await asyncio.sleep(0)
        looking = [asyncio.create_task(store.get(keys(number))) for number in range(3)]
        await asyncio.sleep(0.6)  # longer than the lookup itself takes
        assert not any(each.done() for each in looking)
        for each in looking[:2]:
            each.cancel()
        written.set()
        await asyncio.gather(writing, looking[2])
        assert count(metrics, "redis", "get", "miss") == 2
        assert store.status == "up"
        await store.close()


async def test_a_look_up_waits_for_one_of_our_own_connections_to_redis_for_a_time_limit_only(
    clock: Clock, metrics: Metrics
) -> None:
    written = asyncio.Event()
    async with listening(writing_when(written)) as port:
        store = RedisStore(f"redis://127.0.0.1:{port}", 0.1, 60, clock, metrics, max_connections=1)
        writing = asyncio.create_task(store.put(entries([1])))
        await asyncio.sleep(0)
        assert await asyncio.gather(*(store.get(keys(number)) for number in range(8))) == [[None]] * 8
        assert not writing.done()
        assert count(metrics, "redis", "get", "skipped") == 8
        written.set()
        await writing
        assert count(metrics, "redis", "set", "ok") == 1
        assert store.status == "up"
        await store.close()


async def test_who_waits_for_a_connection_to_a_frozen_redis_waits_no_longer_than_those_who_have_one(
    clock: Clock, metrics: Metrics
) -> None:
    with RedisServer() as server:
        store = RedisStore(server.url, 0.1, 60, clock, metrics, max_connections=3)
        await store.get(keys(0))
        server.pause()
        assert await asyncio.gather(*(store.get(keys(number)) for number in range(50))) == [[None]] * 50
        # Three timeouts stop all further lookups; after the first and the second, one more each may have started.
        late, skipped = (count(metrics, "redis", "get", result) for result in ("timeout", "skipped"))
        assert 3 <= late <= 5
        assert late + skipped == 50
        server.resume()
        await store.close()


async def test_who_stands_in_line_behind_a_large_look_up_in_a_frozen_redis_does_not_wait_as_well(
    clock: Clock, metrics: Metrics
) -> None:
    with RedisServer() as server:
        tiers = Tiers([RedisStore(server.url, 0.02, 60, clock, metrics)], metrics, clock)
        await tiers.open()
        server.pause()
        found = await asyncio.gather(*(tiers.get(keys(*range(600 * i, 600 * i + 600))) for i in range(5)))
        assert found == [[None] * 600] * 5
        assert count(metrics, "redis", "get", "timeout") == 600
        assert count(metrics, "redis", "get", "skipped") == 4 * 600
        server.resume()

        async def answered() -> bool:
            clock.advance(0.1)
            await tiers.get(keys(*range(600)))
            return count(metrics, "redis", "get", "miss") > 0

        await until(answered)
        await tiers.close()


class Asked:
    """Records what is asked, and answers it only once its event in `go` is set."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.under_way: list[int] = []
        self.go: dict[int, asyncio.Event] = {}
        self.late: list[int] = []
        self.together: Coalescer[int, int] = Coalescer(
            self._answer, -1, 10, 1, lambda _: limit, self.late.extend, lambda weight: weight
        )

    async def _answer(self, questions: list[int]) -> Sequence[int]:
        (weight,) = questions
        self.under_way.append(weight)
        await self.go.setdefault(weight, asyncio.Event()).wait()
        self.under_way.remove(weight)
        return questions

    async def ask(self, weight: int) -> asyncio.Task[int]:
        task = asyncio.create_task(self.together.ask(weight))
        await self.turns()
        return task

    async def turns(self) -> None:
        for _ in range(8):
            await asyncio.sleep(0)


async def test_as_many_look_ups_go_at_once_as_may_and_no_more() -> None:
    semaphore = WeightedSemaphore(3)
    waiting = [asyncio.create_task(semaphore.acquire(1)) for _ in range(4)]
    await settle()
    assert [each.done() for each in waiting] == [True, True, True, False]
    semaphore.release(1)
    await waiting[3]


async def test_large_look_ups_go_a_few_at_a_time_in_the_order_they_came_and_small_ones_beside_them() -> None:
    asked = Asked()
    tasks = [await asked.ask(weight) for weight in (30, 40, 1000, 11, 9)]
    assert sorted(asked.under_way) == [9, 30, 40]
    asked.go[30].set()
    await asked.turns()
    assert sorted(asked.under_way) == [9, 40], "the largest is not overtaken by those who came later"
    asked.go[40].set()
    await asked.turns()
    assert sorted(asked.under_way) == [9, 1000], "alone, as it is larger than all may be together"
    asked.go[1000].set()
    await asked.turns()
    assert sorted(asked.under_way) == [9, 11]
    asked.go[11].set()
    asked.go[9].set()
    assert await asyncio.gather(*tasks) == [30, 40, 1000, 11, 9]
    assert asked.together._heavy._in_use == 0


async def test_of_large_look_ups_whose_callers_have_gone_while_they_stood_in_line_nothing_is_asked() -> None:
    asked = Asked()
    first, gone, last = [await asked.ask(weight) for weight in (80, 50, 60)]
    gone.cancel()
    asked.go[80].set()
    await asked.turns()
    assert asked.under_way == [60]
    asked.go[60].set()
    assert (await first, await last) == (80, 60)
    assert asked.together._heavy._in_use == 0


async def test_closing_leaves_nobody_in_line() -> None:
    asked = Asked()
    tasks = [await asked.ask(weight) for weight in (80, 50, 60)]
    await asked.together.close()
    assert await asyncio.gather(*tasks) == [-1] * 3


async def test_a_large_look_up_stands_in_line_for_a_few_time_limits_only() -> None:
    asked = Asked(limit=0.05)
    first, late, gone = [await asked.ask(weight) for weight in (80, 50, 60)]
    gone.cancel()
    assert await late == -1
    asked.go[80].set()
    assert await first == 80
    assert asked.late == [50]
    last = await asked.ask(1000)
    asked.go[1000].set()
    assert await last == 1000, "who left the line has left nothing in it"


class Disk(DiskStore):
    """A disk tier whose reads are recorded and can be delayed."""

    def __init__(self, path: Path, timeout: float, clock: Clock, metrics: Metrics) -> None:
        super().__init__(str(path), 2**24, 60, clock, metrics, timeout=timeout)
        self.reads: list[bytes] = []
        self.takes = 0.0
        self.go = threading.Event()
        self.go.set()

    def _read(self, keys: Sequence[bytes]) -> tuple[list[Embedding | None], int]:
        self.reads.append(keys[0])
        self.go.wait(LIMIT)
        time.sleep(self.takes)  # a slow disk is the subject
        return super()._read(keys)


async def test_a_disk_that_is_at_other_reads_for_too_long_is_not_blamed(
    path: Path, clock: Clock, metrics: Metrics
) -> None:
    store = Disk(path, 0.5, clock, metrics)
    await store.put(entries(range(8)))
    store.takes = 0.15
    found = await asyncio.gather(*(store.get(keys(number)) for number in range(8)))
    hits = sum(each is not None for (each,) in found)
    assert 1 <= hits < 8
    assert count(metrics, "disk", "get", "skipped") == 8 - hits
    assert store.status == "up"
    assert store.reads == keys(*range(len(store.reads))), "of those whose time was over nothing is read"
    assert len(store.reads) < 8
    await store.close()


async def test_of_a_large_read_that_takes_too_long_what_is_there_by_then_is_found(
    path: Path, clock: Clock, metrics: Metrics
) -> None:
    class Slowing(Disk):
        def _read(self, keys: Sequence[bytes]) -> tuple[list[Embedding | None], int]:
            found = super()._read(keys)
            self.go.clear()
            return found

    store = Slowing(path, 0.5, clock, metrics)
    await store.put(entries(range(300)))
    assert await store.get(keys(*range(300))) == [embedding(number) for number in range(128)] + [None] * 172
    assert count(metrics, "disk", "get", "hit") == 128
    assert count(metrics, "disk", "get", "skipped") == 172
    assert store.status == "up"
    store.go.set()
    await store.close()


async def test_look_ups_that_come_while_the_disk_is_read_are_one_read(
    path: Path, clock: Clock, metrics: Metrics
) -> None:
    store = Disk(path, LIMIT, clock, metrics)
    tiers = Tiers([store], metrics, clock)
    await store.put(entries(range(50)))
    store.go.clear()
    looking = []
    for number in range(50):
        looking.append(asyncio.create_task(tiers.get(keys(number))))
        await asyncio.sleep(0.001)
    store.go.set()
    assert await asyncio.gather(*looking) == [[embedding(number)] for number in range(50)]
    assert store.reads == keys(0, 1)
    await tiers.close()


async def test_who_waits_for_a_tier_that_is_slower_than_look_ups_come_goes_on_without_it(
    path: Path, clock: Clock, metrics: Metrics
) -> None:
    class Slower(Disk):
        def time_limit(self, _keys: int, /) -> float:
            return 0.05

    store = Slower(path, LIMIT, clock, metrics)
    tiers = Tiers([store], metrics, clock)
    await store.put(entries(range(4)))
    store.go.clear()
    first = asyncio.create_task(tiers.get(keys(0)))
    await asyncio.sleep(0)
    assert await asyncio.gather(*(tiers.get(each) for each in (keys(1, 2), keys(3)))) == [[None, None], [None]]
    assert count(metrics, "disk", "get", "skipped") == 3
    assert not first.done()
    store.go.set()
    assert await first == [embedding(0)]
    assert await tiers.get(keys(3)) == [embedding(3)]
    assert store.reads == keys(0, 3)
    assert store.status == "up"
    await tiers.close()


async def test_a_query_does_not_wait_until_a_large_read_is_done(path: Path, clock: Clock, metrics: Metrics) -> None:
    store = Disk(path, LIMIT, clock, metrics)
    await store.put(entries(range(2000, 2003)))
    store.go.clear()
    large = asyncio.create_task(store.get(keys(*range(2001))))
    await asyncio.sleep(0)
    small = asyncio.create_task(store.get(keys(2002)))
    await asyncio.sleep(0)
    store.go.set()
    assert await small == [embedding(2002)]
    assert await large == [None] * 2000 + [embedding(2000)]
    assert store.reads.index(key(2002)) == 1 < len(store.reads) - 1
    await store.close()


@pytest.mark.parametrize("size", [1, 300])
async def test_a_disk_that_gets_nothing_done_costs_all_who_wait_one_time_limit_and_is_not_asked_for_them_later(
    path: Path, clock: Clock, metrics: Metrics, size: int
) -> None:
    store = Disk(path, 0.2, clock, metrics)
    await store.open()
    store.go.clear()
    asked = [keys(*range(i * size, i * size + size)) for i in range(6)]
    assert await asyncio.gather(*(store.get(each) for each in asked)) == [[None] * size] * 6
    assert count(metrics, "disk", "get", "timeout") == 6 * size
    clock.advance(30)
    assert await store.get(keys(0)) == [None]
    assert count(metrics, "disk", "get", "skipped") == 1, "it is still at what was given up"
    store.go.set()

    async def answered() -> bool:
        clock.advance(30)
        await store.get(keys(7))
        return store.status == "up"

    await until(answered)
    assert store.reads == keys(0, 7)
    await store.close()
