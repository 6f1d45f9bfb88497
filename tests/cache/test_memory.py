import asyncio

from app import vectors
from app.cache.memory import OVERHEAD, MemoryStore
from app.metrics import Metrics
from app.types import Embedding
from tests.cache.support import Clock, count, embedding, entries, held, key

COST = 64 * 4 + OVERHEAD


def store(clock: Clock, metrics: Metrics, holds: int = 4, ttl: float = 60) -> MemoryStore:
    return MemoryStore(holds * COST, ttl, clock, metrics)


def present(memory: MemoryStore, *numbers: int) -> list[int]:
    found = memory.lookup([key(number) for number in numbers])
    return [number for number, value in zip(numbers, found, strict=True) if value]


def test_what_was_put_in_is_the_very_object_that_comes_out(clock: Clock, metrics: Metrics) -> None:
    memory = store(clock, metrics)
    given = embedding(1)
    memory.insert([(key(1), given)])
    assert memory.lookup([key(1), key(2), key(1)]) == [given, None, given]
    assert memory.lookup([key(1)])[0] is given


def test_it_never_holds_more_bytes_than_it_may(clock: Clock, metrics: Metrics) -> None:
    memory = store(clock, metrics, holds=4)
    for number in range(100):
        memory.insert([(key(number), embedding(number, 64 if number % 3 else 16))])
        assert memory.size <= 4 * COST
    assert len(memory) >= 4
    assert held(metrics, "memory") == memory.size


def test_the_least_recently_used_goes_first(clock: Clock, metrics: Metrics) -> None:
    memory = store(clock, metrics, holds=3)
    memory.insert(entries([1, 2, 3]))
    memory.lookup([key(1)])
    memory.insert(entries([4]))
    assert present(memory, 1, 2, 3, 4) == [1, 3, 4]


def test_a_value_put_in_again_is_counted_once_and_is_young_again(clock: Clock, metrics: Metrics) -> None:
    memory = store(clock, metrics, holds=2, ttl=60)
    memory.insert(entries([1]))
    clock.advance(40)
    memory.insert(entries([1]))
    clock.advance(40)
    assert present(memory, 1) == [1]
    assert memory.size == COST


def test_a_value_is_gone_when_its_time_is_over(clock: Clock, metrics: Metrics) -> None:
    memory = store(clock, metrics, ttl=60)
    memory.insert(entries([1]))
    clock.advance(59.9)
    assert present(memory, 1) == [1]
    clock.advance(0.1)
    assert present(memory, 1) == []
    assert memory.size == len(memory) == 0


def test_the_wall_clock_does_not_matter(clock: Clock, metrics: Metrics) -> None:
    memory = store(clock, metrics, ttl=60)
    memory.insert(entries([1]))
    clock.wall += 10**9
    assert present(memory, 1) == [1]


def test_a_value_larger_than_the_store_throws_nothing_out(clock: Clock, metrics: Metrics) -> None:
    memory = store(clock, metrics, holds=2)
    memory.insert(entries([1, 2]))
    memory.insert([(key(3), embedding(3, 10_000))])
    assert present(memory, 1, 2, 3) == [1, 2]
    assert count(metrics, "memory", "set", "dropped") == 1


def test_every_value_is_counted(clock: Clock, metrics: Metrics) -> None:
    memory = store(clock, metrics)
    memory.insert(entries([1, 2]))
    present(memory, 1, 2, 3)
    assert count(metrics, "memory", "set", "ok") == 2
    assert count(metrics, "memory", "get", "hit") == 2
    assert count(metrics, "memory", "get", "miss") == 1


def test_closed_it_holds_nothing(clock: Clock, metrics: Metrics) -> None:
    async def use() -> list[Embedding | None]:
        memory = store(clock, metrics)
        memory.insert(entries([1]))
        found = memory.lookup([key(1), key(2)])
        await memory.close()
        return found

    assert asyncio.run(use()) == [embedding(1), None]
    assert held(metrics, "memory") == 0


def test_numbers_asked_for_the_second_time_are_kept_as_text(clock: Clock, metrics: Metrics) -> None:
    memory = store(clock, metrics, holds=4)
    given = embedding(1)
    memory.insert([(key(1), given)])
    for numbers, kept in ((False, False), (True, False), (False, False), (True, True)):
        assert memory.lookup([key(1)], numbers=numbers) == [given]
        assert (given.text is not None) == kept
    assert given.text == vectors.to_json(given.vector)
    assert memory.size == COST + len(given.text) == held(metrics, "memory")
    memory.insert([(key(1), embedding(1))])
    assert memory.size == COST


def test_texts_count_and_take_about_half_the_room_at_most(clock: Clock, metrics: Metrics) -> None:
    memory = store(clock, metrics, holds=100)
    memory.insert(entries(range(100)))
    for _ in range(10):
        memory.lookup([key(number) for number in range(99, -1, -1)], numbers=True)
    kept = [value for number in range(100) if (value := memory.lookup([key(number)])[0])]
    texts = sum(len(each.text or b"") for each in kept)
    assert 0 < texts <= 100 * COST // 2 + 64 * 16
    assert memory.size == len(kept) * COST + texts <= 100 * COST
    memory.insert(entries(range(200, 300)))
    assert memory.size == 100 * COST
