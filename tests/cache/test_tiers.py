import asyncio
import logging
from collections.abc import Sequence

import pytest

from app.cache.build import stores
from app.cache.counts import Counts
from app.cache.memory import MemoryStore
from app.cache.reader import Found, Reader
from app.cache.store import LookupResult, Store
from app.cache.tiers import Tiers
from app.cache.writer import Writer
from app.config import CacheSettings
from app.metrics import Metrics
from app.types import Embedding
from tests.cache.support import LIMIT, Clock, count, embedding, entries, key, until
from tests.clock import HandClock, settle


class Slow:
    """A slow tier over a dict that records what it is asked, and can be made to stall or to raise."""

    at_once = 8
    status = "up"

    def __init__(self, name: str = "redis") -> None:
        self.name = name
        self.values: dict[bytes, Embedding] = {}
        self.asked: list[list[bytes]] = []
        self.batches: list[int] = []
        self.open_for_writes = asyncio.Event()
        self.open_for_writes.set()
        self.fault: Exception | None = None
        self.away = False
        self.closed = False

    def time_limit(self, _keys: int, /) -> float:
        return LIMIT

    async def open(self) -> None: ...

    async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        self.asked.append(list(keys))
        await asyncio.sleep(0)
        if self.fault:
            raise self.fault
        return [self.values.get(each) for each in keys]

    async def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> Sequence[tuple[bytes, Embedding]]:
        self.batches.append(len(entries))
        await self.open_for_writes.wait()
        if self.fault:
            raise self.fault
        self.values.update(entries)
        return ()

    async def takes_writes(self) -> bool:
        return not self.away

    async def close(self) -> None:
        self.closed = True
        if self.fault:
            raise self.fault


def keys(*numbers: int) -> list[bytes]:
    return [key(number) for number in numbers]


def memory(clock: Clock, metrics: Metrics) -> MemoryStore:
    return MemoryStore(2**20, 60, clock, metrics)


async def test_when_memory_has_all_nothing_is_awaited_and_nobody_else_is_asked(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    tiers = Tiers([memory(clock, metrics), slow], metrics, clock)
    tiers.put(entries([1, 2]))
    with pytest.raises(StopIteration) as answer:
        tiers.get(keys(2, 1)).send(None)
    assert answer.value.value == [embedding(2), embedding(1)]
    assert slow.asked == []
    await tiers.close()


async def test_what_comes_into_memory_while_a_slower_tier_is_asked_is_found(clock: Clock, metrics: Metrics) -> None:
    class Gated(Slow):
        async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
            tiers.put(entries([1]))  # a call has ended, and the tier does not have its vector yet
            return await super().get(keys)

    slow = Gated()
    slow.open_for_writes.clear()
    tiers = Tiers([memory(clock, metrics), slow], metrics, clock)
    assert await tiers.get(keys(2, 1)) == [None, embedding(1)]
    assert count(metrics, "memory", "get", "miss") == 2, "each is counted once"
    slow.open_for_writes.set()
    await tiers.close()


async def test_only_what_a_tier_lacks_goes_to_the_next(clock: Clock, metrics: Metrics) -> None:
    disk, redis = Slow("disk"), Slow("redis")
    tiers = Tiers([memory(clock, metrics), disk, redis], metrics, clock)
    tiers._memory.insert(entries([1]))  # type: ignore[union-attr]
    disk.values.update(entries([2]))
    redis.values.update(entries([3]))
    found = await tiers.get(keys(1, 2, 3, 4))
    assert found == [embedding(1), embedding(2), embedding(3), None]
    assert disk.asked == [keys(2, 3, 4)]
    assert redis.asked == [keys(3, 4)]
    await tiers.close()


async def test_what_a_slow_tier_finds_is_put_into_those_above_it(clock: Clock, metrics: Metrics) -> None:
    disk, redis = Slow("disk"), Slow("redis")
    tiers = Tiers([memory(clock, metrics), disk, redis], metrics, clock)
    redis.values.update(entries([1]))
    disk.values.update(entries([2]))
    await tiers.get(keys(1, 2))
    await tiers.get(keys(1, 2))
    assert len(redis.asked) == 1
    await tiers.close()
    assert disk.values == dict(entries([1, 2]))
    assert redis.batches == []


async def test_what_is_renewed_while_an_older_one_is_on_its_way_up_stays(clock: Clock, metrics: Metrics) -> None:
    class Gated(Slow):
        async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
            found = await super().get(keys)
            tiers.put([(key(1), embedding(7))])  # a caller asked for a new one, and got it
            return found

    disk, redis = Slow("disk"), Gated("redis")
    redis.values.update(entries([1, 2]))
    tiers = Tiers([memory(clock, metrics), disk, redis], metrics, clock)
    await tiers.get(keys(1, 2))
    assert await tiers.get(keys(1, 2)) == [embedding(7), embedding(2)]
    await tiers.close()
    assert disk.values == redis.values == {key(1): embedding(7), key(2): embedding(2)}


async def test_what_is_found_below_takes_the_place_of_what_is_too_old(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    tiers = Tiers([memory(clock, metrics), slow], metrics, clock)
    tiers.put(entries([1]))

    async def written() -> bool:
        return bool(slow.values)

    await until(written)
    clock.advance(60)
    for _ in range(2):
        assert await tiers.get(keys(1)) == [embedding(1)]
    assert slow.asked == [keys(1)]
    await tiers.close()


async def test_a_key_asked_for_twice_is_looked_up_once_and_answered_twice(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    slow.values.update(entries([1]))
    tiers = Tiers([memory(clock, metrics), slow], metrics, clock)
    assert await tiers.get(keys(1, 2, 1, 2)) == [embedding(1), None, embedding(1), None]
    assert slow.asked == [keys(1, 2)]
    await tiers.close()


async def test_requests_of_one_turn_share_a_look_up_and_each_gets_its_own(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    slow.values.update(entries(range(0, 33, 2)))
    tiers = Tiers([slow], metrics, clock)
    answers = await asyncio.gather(*(tiers.get(keys(n, n + 1, n)) for n in range(32)))
    even_first = [[embedding(n), None, embedding(n)] for n in range(32)]
    odd_first = [[None, embedding(n + 1), None] for n in range(32)]
    assert answers == [odd_first[n] if n % 2 else even_first[n] for n in range(32)]
    assert slow.asked == [keys(*range(33))]
    await tiers.close()


async def test_a_look_up_is_shared_up_to_64_keys_and_what_is_larger_has_its_own(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    tiers = Tiers([slow], metrics, clock)
    await asyncio.gather(
        *(tiers.get(keys(*each)) for each in (range(40), range(100, 124), [200], range(500, 700), [1]))
    )
    assert [len(each) for each in slow.asked] == [64, 2, 200]
    await tiers.close()


async def test_what_many_ask_for_is_put_into_the_tiers_above_once(clock: Clock, metrics: Metrics) -> None:
    disk, redis = Slow("disk"), Slow("redis")
    redis.values.update(entries([1]))
    tiers = Tiers([memory(clock, metrics), disk, redis], metrics, clock)
    assert await asyncio.gather(*(tiers.get(keys(1)) for _ in range(16))) == [[embedding(1)]] * 16
    await tiers.close()
    assert disk.batches == [1]


async def test_who_hangs_up_takes_nobodys_answer_along(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    slow.values.update(entries(range(8)))
    tiers = Tiers([slow], metrics, clock)
    for turns in range(4):
        asking = [asyncio.create_task(tiers.get(keys(number))) for number in range(8)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for each in asking[:4]:
            each.cancel()
        async with asyncio.timeout(LIMIT):
            assert await asyncio.gather(*asking[4:]) == [[embedding(number)] for number in range(4, 8)]
        answers = await asyncio.gather(*asking[:4], return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in answers)
    await tiers.close()


@pytest.mark.parametrize("turns", [1, 2, 3])
async def test_closing_leaves_nobody_waiting(clock: Clock, metrics: Metrics, turns: int) -> None:
    class Frozen(Slow):
        async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
            await asyncio.Event().wait()
            raise AssertionError

    found: list[object] = []
    reader = Reader(Frozen(), Counts(metrics, "redis"), found.append, clock.monotonic)
    asking = asyncio.create_task(reader.get(keys(1)))
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(LIMIT):
        await reader.close()
        assert await asking == Found({})
    assert found == []


async def test_who_hangs_up_as_the_answer_comes_has_hung_up_and_no_more(clock: Clock, metrics: Metrics) -> None:
    class Leaving(Slow):
        async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
            asyncio.get_running_loop().call_soon(asking.cancel)
            return [None]

    reader = Reader(Leaving(), Counts(metrics, "disk"), lambda _: None, clock.monotonic)
    asking = asyncio.create_task(reader.get(keys(1)))
    with pytest.raises(asyncio.CancelledError):
        await asking
    await reader.close()


async def test_it_works_without_memory_and_without_any_tier(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    tiers = Tiers([slow], metrics, clock)
    tiers.put(entries([1]))
    await tiers.close()
    assert await tiers.get(keys(1, 2)) == [embedding(1), None]
    nothing = Tiers([], metrics, clock)
    nothing.put(entries([1]))
    assert (await nothing.get(keys(1)), nothing.status()) == ([None], {})


async def test_without_memory_what_waits_to_be_written_is_found(clock: Clock, metrics: Metrics) -> None:
    disk, redis = Slow("disk"), Slow("redis")
    redis.open_for_writes.clear()
    tiers = Tiers([disk, redis], metrics, clock)
    tiers.put(entries(range(300)))
    await asyncio.sleep(0)  # the first are being written
    tiers.put([(key(1), embedding(7))])  # a caller asked for a new one, and got it
    assert await tiers.get(keys(299, 0, 1)) == [embedding(299), embedding(0), embedding(7)]
    assert (await tiers.get_or_claim(keys(2, 300)))[0] == [embedding(2), None]
    assert redis.asked == [keys(300)]
    redis.open_for_writes.set()
    await tiers.close()
    assert redis.values[key(1)] == embedding(7)
    assert tiers._writers[1].waiting == {}, "it is kept for no longer"


async def test_what_memory_has_no_room_for_is_found_until_it_is_written(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    slow.open_for_writes.clear()
    tiers = Tiers([MemoryStore(2000, 60, clock, metrics), slow], metrics, clock)
    tiers.put(entries(range(9)))  # from one call; memory keeps the last two
    assert await tiers.get(keys(8, 0, 300)) == [embedding(8), embedding(0), None]
    assert slow.asked == [keys(300)], "what waits to be written is not asked for"
    slow.open_for_writes.set()
    await tiers.close()


async def test_what_waits_for_one_tier_is_found_though_the_next_has_refused_it(clock: Clock, metrics: Metrics) -> None:
    disk, redis = Slow("disk"), Slow("redis")
    disk.open_for_writes.clear()
    redis.fault = ConnectionError("down")
    tiers = Tiers([MemoryStore(2000, 60, clock, metrics), disk, redis], metrics, clock)
    tiers.put(entries(range(9)))  # from one call; memory keeps the last two
    await settle()
    assert tiers._writers[1].waiting == {}
    assert await tiers.get(keys(8, 0)) == [embedding(8), embedding(0)]
    redis.fault = None
    disk.open_for_writes.set()
    await tiers.close()
    assert len(disk.values) == 9


async def test_without_memory_what_comes_while_a_tier_is_asked_is_found(clock: Clock, metrics: Metrics) -> None:
    class Gated(Slow):
        async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
            found = await super().get(keys)
            tiers.put(entries([1]))  # a call has ended, and the tier does not have its vector yet
            return found

    slow = Gated()
    slow.open_for_writes.clear()
    tiers = Tiers([slow], metrics, clock)
    assert await tiers.get(keys(2, 1)) == [None, embedding(1)]
    await tiers.close(timeout=0.01)
    assert tiers._writers[0].waiting == {}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("fast", [False, True])
async def test_what_comes_while_a_tier_is_asked_is_found_though_it_is_written_and_nowhere_here_by_then(
    clock: Clock, metrics: Metrics, fast: bool, again: bool
) -> None:
    class Gated(Slow):
        async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
            found = await super().get(keys)
            if not self.batches:
                tiers.put(entries([1]))  # a call has ended
                while tiers._writers[0].waiting:  # takes a turn or two
                    await asyncio.sleep(0)
            return found

        async def get_or_claim(self, keys: Sequence[bytes]) -> LookupResult:
            return await self.get(keys), ()

        async def release_claims(self, keys: Sequence[bytes]) -> None: ...

        async def renew_claims(self) -> None: ...

    slow = Gated()
    too_small = MemoryStore(1, 60, clock, metrics)
    tiers = Tiers([too_small, slow] if fast else [slow], metrics, clock)
    found = (await tiers.look_again(keys(2, 1))).embeddings if again else await tiers.get(keys(2, 1))
    assert found == ({key(1): embedding(1)} if again else [None, embedding(1)])
    assert (tiers._writers[0].waiting, tiers._arrived, tiers._lookups) == ({}, {}, {}), "it is kept for no longer"
    await tiers.close()


async def test_writing_holds_nobody_up(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    slow.open_for_writes.clear()
    tiers = Tiers([memory(clock, metrics), slow], metrics, clock)
    tiers.put(entries([1]))
    assert await tiers.get(keys(1)) == [embedding(1)]
    slow.open_for_writes.set()
    await tiers.close()
    assert slow.values == dict(entries([1]))


async def test_a_tier_that_stalls_does_not_hold_up_the_next(clock: Clock, metrics: Metrics) -> None:
    disk, redis = Slow("disk"), Slow("redis")
    disk.open_for_writes.clear()
    tiers = Tiers([disk, redis], metrics, clock)
    tiers.put(entries([1]))

    async def written() -> bool:
        return bool(redis.values)

    await until(written)
    disk.open_for_writes.set()
    await tiers.close()


async def test_what_comes_while_a_write_is_under_way_is_written_together(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    slow.open_for_writes.clear()
    tiers = Tiers([slow], metrics, clock)
    tiers.put(entries([0]))
    await asyncio.sleep(0)
    for number in range(1, 600):
        tiers.put(entries([number]))
        await asyncio.sleep(0)
    slow.open_for_writes.set()
    await tiers.close()
    assert slow.batches == [1, 256, 256, 87]
    assert len(slow.values) == 600


async def test_what_waits_to_be_written_is_bounded_in_bytes(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    slow.open_for_writes.clear()
    tiers = Tiers([slow], metrics, clock, write_buffer=100_000)
    for number in range(1000):
        tiers.put(entries([number]))
        await asyncio.sleep(0)
        assert tiers._writers[0].size <= 100_000
    dropped = count(metrics, "redis", "set", "dropped")
    slow.open_for_writes.set()
    await tiers.close()
    assert 0 < len(slow.values) == 1000 - dropped < 200
    assert tiers._writers[0].size == 0
    # The oldest is kept: its write has already begun.
    assert key(0) in slow.values


async def test_what_has_no_room_in_the_queue_is_written_from_memory(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    slow.open_for_writes.clear()
    tiers = Tiers([MemoryStore(200_000, 60, clock, metrics), slow], metrics, clock, write_buffer=10_000)
    tiers.put(entries(range(1000)))  # memory keeps the last ones
    assert tiers._writers[0].size <= 10_000
    kept = sum(tiers._memory.peek(key(number)) is not None for number in range(1000)) if tiers._memory else 0
    assert 200 < kept < 500
    slow.open_for_writes.set()
    await tiers.close()
    first = 10_000 // (embedding(0).size + 512)
    assert slow.values == dict(entries([*range(first), *range(1000 - kept, 1000)]))
    assert count(metrics, "redis", "set", "dropped") == 1000 - kept - first
    assert (tiers._writers[0].size, tiers._writers[0]._bare_keys) == (0, 0)


async def test_what_is_written_from_memory_is_found_until_it_is(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    slow.open_for_writes.clear()
    tiers = Tiers([MemoryStore(20_000, 60, clock, metrics), slow], metrics, clock, write_buffer=0)
    tiers.put(entries(range(5)))  # written at once
    await settle()
    assert slow.batches == [5]
    tiers.put(entries(range(100, 200)))  # memory evicts the first five for them
    assert await tiers.get(keys(*range(5))) == list(map(embedding, range(5)))
    assert slow.asked == []
    slow.open_for_writes.set()
    await tiers.close()
    assert tiers._writers[0].waiting == {}


async def test_an_older_embedding_is_not_written_over_one_that_was_written_from_memory(
    clock: Clock, metrics: Metrics
) -> None:
    slow, held = Slow(), dict(entries(range(300)))
    slow.open_for_writes.clear()
    writer = Writer(slow, Counts(metrics, slow.name), embedding(0).size + 512, held.get, clock)
    writer.offer(entries([0]))  # fills the buffer
    await settle()
    writer.offer(entries(range(1, 257)))  # only their keys wait
    slow.open_for_writes.set()
    while writer.size:
        await asyncio.sleep(0)
    slow.open_for_writes.clear()
    writer.offer([(key(1), embedding(7))])
    held[key(1)] = embedding(8)
    writer.offer([(key(1), embedding(8))])
    await settle()
    assert slow.batches == [1, 256]
    held.clear()
    slow.open_for_writes.set()
    await writer.close(5)
    assert slow.values[key(1)] == embedding(8)
    assert (writer.size, writer.waiting) == (0, {})


async def test_many_keys_of_which_memory_has_let_go_do_not_hold_up_the_event_loop(
    clock: Clock, metrics: Metrics
) -> None:
    slow = Slow()
    slow.open_for_writes.clear()
    tiers = Tiers([MemoryStore(200_000, 60, clock, metrics), slow], metrics, clock, write_buffer=10_000)
    for number in range(10_000):
        tiers.put(entries([number]))
    writer = tiers._writers[0]
    assert len(writer._queue) > 9000
    slow.open_for_writes.set()
    turns = 0
    while writer._queue:
        await asyncio.sleep(0)
        turns += 1
    assert turns > 9000 // 256
    await tiers.close()


async def test_room_in_the_queue_comes_back(clock: Clock, metrics: Metrics) -> None:
    slow = Slow()
    tiers = Tiers([slow], metrics, clock, write_buffer=2_000)

    async def empty() -> bool:
        return tiers._writers[0].size == 0

    for number in range(50):
        tiers.put(entries([number]))
        await until(empty)
    assert len(slow.values) == 50
    await tiers.close()


async def test_closing_gives_up_on_a_tier_that_does_not_take_what_waits(
    clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow()
    slow.open_for_writes.clear()
    tiers = Tiers([memory(clock, metrics), slow], metrics, clock)
    tiers.put(entries(range(300)))
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await tiers.close(timeout=0.01)
    assert slow.closed
    assert count(metrics, "redis", "set", "dropped") == 300
    assert "300 values not written" in caplog.text, "those in hand too"
    tiers.put(entries([1]))
    assert count(metrics, "redis", "set", "dropped") == 301


async def test_what_waits_for_a_tier_that_is_away_is_bounded_found_and_written_with_the_newest_last(
    metrics: Metrics,
) -> None:
    clock, slow = HandClock(), Slow()
    slow.away = True
    tiers = Tiers([MemoryStore(50_000, 3600, clock, metrics), slow], metrics, clock, write_buffer=10_000)
    writer = tiers._writers[0]
    tiers.put(entries([0]))
    tiers.put([(key(0), embedding(7))])
    for number in range(1, 1000):
        tiers.put(entries([number]))
        await clock.advance(1)
        assert writer.size <= 10_000
    assert await tiers.get(keys(0)) == [embedding(7)]
    assert slow.asked == []
    assert slow.batches == []
    waiting = len(writer._queue)
    slow.away = False
    await clock.advance(1)
    while writer._task:
        await asyncio.sleep(0)
    dropped = count(metrics, "redis", "set", "dropped")
    assert 0 < len(slow.values) == waiting - 1 - dropped < 200
    assert slow.values[key(0)] == embedding(7)
    await tiers.close()


async def test_closing_does_not_wait_for_a_tier_that_is_away(
    metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    clock, slow = HandClock(), Slow()
    slow.away = True
    tiers = Tiers([slow], metrics, clock)
    tiers.put(entries(range(300)))
    await settle()
    async with asyncio.timeout(LIMIT / 2):
        await tiers.close(timeout=LIMIT)
    assert slow.closed
    assert slow.batches == []
    assert count(metrics, "redis", "set", "dropped") == 300
    assert "300 values not written" in caplog.text


async def test_closing_writes_what_waits_for_a_tier_that_is_back(metrics: Metrics) -> None:
    clock, slow = HandClock(), Slow()
    slow.away = True
    tiers = Tiers([slow], metrics, clock)
    tiers.put(entries(range(300)))
    await settle()
    slow.away = False
    closing = asyncio.create_task(tiers.close(timeout=LIMIT))
    await settle()
    await clock.advance(1)
    await closing
    assert len(slow.values) == 300


async def test_a_tier_that_raises_is_a_miss_and_is_reported_now_and_then(
    clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    broken, below = Slow("disk"), Slow("redis")
    broken.fault = RuntimeError("must not happen")
    below.values.update(entries([1]))
    tiers = Tiers([broken, below], metrics, clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert await tiers.get(keys(1, 2)) == [embedding(1), None]
        assert [each.getMessage() for each in caplog.records if "reading" in each.getMessage()] == [
            "cache tier disk raised while reading"
        ]
        clock.advance(60)
        await tiers.get(keys(2))
    assert sum("reading" in each.getMessage() for each in caplog.records) == 2
    assert count(metrics, "disk", "get", "error") == 11
    tiers.put(entries([3]))
    await tiers.close()
    assert count(metrics, "disk", "set", "error") >= 1
    assert broken.closed
    assert below.closed


async def test_a_tier_that_answers_too_few_is_a_miss(clock: Clock, metrics: Metrics) -> None:
    class Short(Slow):
        async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
            return [embedding(1)]

    tiers = Tiers([Short()], metrics, clock)
    assert await tiers.get(keys(1, 2)) == [None, None]
    await tiers.close()


async def test_a_tier_that_would_never_be_asked_is_refused(clock: Clock, metrics: Metrics) -> None:
    class Plain:
        """Implements `Store` only."""

        name, status = "plain", "up"

        async def close(self) -> None: ...

    never: list[list[Store]] = [[Plain()], [Slow(), memory(clock, metrics)]]
    for built in never:
        with pytest.raises(TypeError, match="never be asked"):
            Tiers(built, metrics, clock)


async def test_only_slow_tiers_outlive_the_process(clock: Clock, metrics: Metrics) -> None:
    fast: list[Store] = [memory(clock, metrics)]
    assert [Tiers(built, metrics, clock).persistent for built in ([], fast, [*fast, Slow()])] == [False, False, True]


async def test_the_configuration_gives_the_tiers_in_their_order(
    clock: Clock, metrics: Metrics, tmp_path: object
) -> None:
    settings = CacheSettings.model_validate(
        {"disk": {"path": f"{tmp_path}/e.sqlite3"}, "redis": {"url": "redis://:secret@127.0.0.1:1"}}
    )
    built: list[Store] = stores(settings, lambda: 60, metrics, clock)
    assert [store.name for store in built] == ["memory", "disk", "redis"]
    tiers = Tiers(built, metrics, clock)
    await tiers.open()
    status = tiers.status()
    assert (status["memory"], status["disk"]) == ("up", "up")
    assert status["redis"].startswith("down: ConnectionError")
    assert "secret" not in str(status)
    await tiers.close()
    assert [store.name for store in stores(CacheSettings(memory=None), lambda: 60, metrics, clock)] == []


async def test_of_what_is_dropped_the_keys_are_told(clock: Clock, metrics: Metrics) -> None:
    slow, held = Slow(), dict(entries([1]))
    slow.open_for_writes.clear()
    writer, told = Writer(slow, Counts(metrics, slow.name), embedding(0).size + 512, held.get, clock), list[bytes]()
    writer.on_drop = told.extend
    writer.offer(entries([0]))  # fills the buffer
    await settle()
    writer.offer(entries([1, 2]))  # of the first only the key waits
    await settle()
    assert told == [key(2)]
    held.clear()
    slow.open_for_writes.set()
    await settle()
    assert told == [key(2), key(1)]
    assert count(metrics, "redis", "set", "dropped") == 2
    await writer.close(5)
