"""What is embedded while a slow tier is away is written once it is back."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from app.cache.disk import DiskStore
from app.cache.redis import RedisStore
from app.cache.tiers import Tiers
from app.metrics import Metrics
from app.types import Embedding
from tests.cache.support import LIMIT, count, entries, listening, present, until
from tests.clock import HandClock
from tests.redis_server import RedisServer


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def server() -> Iterator[RedisServer]:
    built = RedisServer()
    yield built
    built.close()


def disk(path: Path, clock: HandClock, metrics: Metrics) -> DiskStore:
    return DiskStore(str(path), 8 * 2**20, 86400, clock, metrics, timeout=LIMIT)


async def until_it_waits(tiers: Tiers) -> None:
    async def waits() -> bool:
        return tiers._writers[0]._away

    await until(waits)


async def until_written(tiers: Tiers, clock: HandClock) -> None:
    async def written() -> bool:
        await clock.advance(1)
        return not tiers._writers[0].size

    await until(written)


async def over_a_redis_that_dies(server: RedisServer, clock: HandClock, metrics: Metrics) -> tuple[RedisStore, Tiers]:
    """Kills the server once the first value has been written."""
    server.start()
    store = RedisStore(server.url, LIMIT, 3600, clock, metrics)
    tiers = Tiers([store], metrics, clock)
    tiers.put(entries([0]))
    await until_written(tiers, clock)
    server.kill()
    return store, tiers


async def over_a_disk_that_is_held(
    path: Path, clock: HandClock, metrics: Metrics
) -> tuple[DiskStore, sqlite3.Connection]:
    """Also the connection that holds its file until it is closed."""
    store = disk(path, clock, metrics)
    await store.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return store, other


async def test_what_comes_while_redis_is_away_is_written_once_it_is_back(
    server: RedisServer, clock: HandClock, metrics: Metrics
) -> None:
    store, tiers = await over_a_redis_that_dies(server, clock, metrics)
    tiers.put(entries(range(1, 601)))
    await until_it_waits(tiers)
    before = [count(metrics, "redis", "set", result) for result in ("error", "skipped")]
    assert before == [192, 64], "a batch noticed it"
    for _ in range(300):
        await clock.advance(1)
    assert [count(metrics, "redis", "set", result) for result in ("error", "skipped")] == before, (
        "no probe costs values"
    )
    server.start()
    await until_written(tiers, clock)
    assert await present(store, *range(1, 601)) == [*range(1, 601)]
    assert count(metrics, "redis", "set", "ok") == 601
    await tiers.close()


@pytest.mark.parametrize("number", [1, 100, 256])
async def test_what_is_too_little_to_find_out_that_redis_is_away_is_written_too(
    number: int, server: RedisServer, clock: HandClock, metrics: Metrics
) -> None:
    store, tiers = await over_a_redis_that_dies(server, clock, metrics)
    tiers.put(entries(range(1, number + 1)))
    await until_it_waits(tiers)
    server.start()
    await until_written(tiers, clock)
    assert await present(store, *range(1, number + 1)) == [*range(1, number + 1)]
    await tiers.close()


class Interrupted(RedisStore):
    """Its server is killed when half of a batch of 256 has been written."""

    server: RedisServer
    pipelines = 0

    async def _write(self, entries: Sequence[tuple[bytes, Embedding]]) -> list[object]:
        self.pipelines += 1
        if self.pipelines == 3:
            await asyncio.to_thread(self.server.kill)
        return await super()._write(entries)


async def test_of_a_batch_that_an_outage_cuts_in_two_each_value_is_written_and_counted_once(
    server: RedisServer, clock: HandClock, metrics: Metrics
) -> None:
    server.start()
    store = Interrupted(server.url, LIMIT, 3600, clock, metrics)
    store.server = server
    tiers = Tiers([store], metrics, clock)
    tiers.put(entries(range(256)))
    await until_it_waits(tiers)
    assert count(metrics, "redis", "set", "ok") == 128
    server.start()  # empty: what it had been given before is lost
    await until_written(tiers, clock)
    assert await present(store, *range(256)) == [*range(128, 256)]
    assert count(metrics, "redis", "set", "ok") == 256
    await tiers.close()


@pytest.mark.parametrize(
    ("refuse", "accept"),
    [
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
        ("CONFIG SET min-replicas-to-write 1", "CONFIG SET min-replicas-to-write 0"),
    ],
)
async def test_what_comes_while_redis_takes_no_writes_as_in_a_failover_is_written_once_it_does(
    refuse: str, accept: str, server: RedisServer, clock: HandClock, metrics: Metrics
) -> None:
    server.start()
    store = RedisStore(server.url, LIMIT, 3600, clock, metrics)
    tiers = Tiers([store], metrics, clock)
    await store._connections.exchange([tuple(refuse.encode().split())])
    tiers.put(entries(range(300)))
    await until_it_waits(tiers)
    refused = count(metrics, "redis", "set", "error")
    for _ in range(30):
        await clock.advance(1)
    assert count(metrics, "redis", "set", "error") == refused, "no probe costs values"
    await store._connections.exchange([tuple(accept.encode().split())])
    await until_written(tiers, clock)
    assert await present(store, *range(300)) == [*range(300)]
    assert count(metrics, "redis", "set", "ok") == 300
    await tiers.close()


async def test_what_comes_while_the_disk_cannot_be_opened_is_written_once_it_can(
    tmp_path: Path, clock: HandClock, metrics: Metrics
) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = disk(tmp_path / "file" / "embeddings.sqlite3", clock, metrics)
    for _ in range(3):
        await store.open()
    tiers = Tiers([store], metrics, clock)
    tiers.put(entries(range(300)))
    await until_it_waits(tiers)
    (tmp_path / "file").unlink()
    await until_written(tiers, clock)
    assert await present(store, *range(300)) == [*range(300)]
    await tiers.close()


async def test_what_comes_while_another_process_holds_the_file_is_written_once_it_does_not(
    path: Path, clock: HandClock, metrics: Metrics
) -> None:
    store, other = await over_a_disk_that_is_held(path, clock, metrics)
    for number in range(3):
        await store.put(entries([number]))
    tiers = Tiers([store], metrics, clock)
    tiers.put(entries(range(10, 20)))
    await until_it_waits(tiers)
    other.close()
    await until_written(tiers, clock)
    assert await present(store, *range(10, 20)) == [*range(10, 20)]
    await tiers.close()


async def test_what_meets_a_file_that_is_held_for_a_moment_is_written_too(
    path: Path, clock: HandClock, metrics: Metrics
) -> None:
    store, other = await over_a_disk_that_is_held(path, clock, metrics)
    tiers = Tiers([store], metrics, clock)
    tiers.put(entries(range(20)))

    async def refused() -> bool:
        return count(metrics, "disk", "set", "error") > 0

    await until(refused)
    other.close()
    await until_written(tiers, clock)
    assert await present(store, *range(20)) == [*range(20)]
    await tiers.close()


async def test_what_is_given_up_is_counted_as_dropped_and_logged_once_a_minute(
    clock: HandClock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    async def without_writes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hangs up on every write, and says on every other connection that it is there."""
        while command := await reader.read(2**16):
            if b"SET" in command:
                return
            writer.write(b"+PONG\r\n")

    async def given_up() -> bool:
        if clock.sleepers:  # it waits until it may try again, for a second
            await clock.advance(1)
        return not tiers._writers[0].size

    async with listening(without_writes) as port:
        store = RedisStore(f"redis://127.0.0.1:{port}", LIMIT, 3600, clock, metrics)
        tiers = Tiers([store], metrics, clock)
        for number in (1, 2, 3):
            tiers.put(entries([number]))
            await until(given_up)
            assert count(metrics, "redis", "set", "dropped") == number
            assert caplog.text.count("not written") == 1
        await clock.advance(60)
        tiers.put(entries([4]))
        await until(given_up)
        assert count(metrics, "redis", "set", "dropped") == 4
        assert "cache tier redis: 3 values not written after 6 tries" in caplog.text
        await tiers.close()
