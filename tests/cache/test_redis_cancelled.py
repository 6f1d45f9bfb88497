"""A command that is cancelled half-way must not leave its reply to the next command (CVE-2023-28858)."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from app.cache.redis import PREFIX, RedisStore
from app.metrics import Metrics
from tests.cache.support import LIMIT, Clock, count, embedding, entries, key
from tests.redis_server import RedisServer


@pytest.fixture
def server() -> Iterator[RedisServer]:
    built = RedisServer()
    yield built
    built.close()


async def test_killed_in_the_middle_of_a_look_up_it_is_a_miss(
    server: RedisServer, clock: Clock, metrics: Metrics
) -> None:
    store = RedisStore(server.start().url, LIMIT, 60, clock, metrics)
    await store.open()
    server.pause()
    asking = asyncio.create_task(store.get([key(1)]))
    await asyncio.sleep(0)
    await asyncio.to_thread(server.kill)
    assert await asking == [None]
    assert count(metrics, "redis", "get", "error") == 1
    await store.close()


async def in_the_middle(server: RedisServer, work: Callable[[], Awaitable[object]]) -> None:
    """Cancels `work` after its command is sent and before its reply arrives."""
    server.pause()
    task = asyncio.ensure_future(work())
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server.resume()


async def test_after_a_look_up_that_was_cancelled_in_the_middle_the_next_gets_its_own_values(
    server: RedisServer, clock: Clock, metrics: Metrics
) -> None:
    # One connection, so that the next command would read any reply left on it.
    store = RedisStore(server.start().url, LIMIT, 60, clock, metrics, max_connections=1)
    await store.put(entries(range(20)))
    for number in range(10):
        await in_the_middle(server, lambda number=number: store.get([key(number)]))  # type: ignore[misc]
        assert await store.get([key(number + 10)]) == [embedding(number + 10)]
    assert count(metrics, "redis", "get", "corrupt") == 0
    assert store.status == "up"
    await store.close()


async def test_after_a_write_that_was_cancelled_in_the_middle_the_next_look_up_gets_its_own_values(
    server: RedisServer, clock: Clock, metrics: Metrics
) -> None:
    store = RedisStore(server.start().url, LIMIT, 60, clock, metrics, max_connections=1)
    await store.put(entries([1]))
    await in_the_middle(server, lambda: store.put(entries(range(100, 150))))
    assert await store.get([key(1)]) == [embedding(1)]
    assert count(metrics, "redis", "get", "corrupt") == 0
    await store.close()


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_at_any_moment_it_loses_no_connection_and_mixes_no_replies(
    server: RedisServer, clock: Clock, metrics: Metrics, turns: int
) -> None:
    store = RedisStore(server.start().url, LIMIT, 60, clock, metrics, max_connections=2)
    await store.put(entries(range(40)))
    await store._connections.drop_idle()
    for number in range(20):
        tasks = [asyncio.create_task(store.get([key(number + place)])) for place in range(4)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await store.get([key(number + 20)]) == [embedding(number + 20)]
    assert store._connections._slots.qsize() == 2
    assert count(metrics, "redis", "get", "corrupt") == 0
    await store.close()


async def test_a_reply_that_is_out_of_step_all_the_same_is_recognised(
    server: RedisServer, clock: Clock, metrics: Metrics
) -> None:
    store = RedisStore(server.start().url, LIMIT, 60, clock, metrics, max_connections=1)
    await store.put(entries([1, 2]))
    connection = store._connections._slots.get_nowait()
    assert connection is not None
    # A command whose reply nobody reads, sent behind the store's back while the connection is checked out.
    await connection.send_packed_command(connection.pack_commands([(b"MGET", PREFIX + key(1))]))
    connection.can_read = _nothing  # type: ignore[method-assign]
    store._connections._slots.put_nowait(connection)
    assert await store.get([key(2)]) == [None]
    assert count(metrics, "redis", "get", "corrupt") == 1
    await store.close()


async def _nothing() -> bool:
    return False
