# ruff: noqa: ASYNC240  # a test may block its own event loop
"""The disk tier with a healthy file; test_disk_faults.py has the others."""

import asyncio
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from threading import Event

from app.cache.table import Table
from app.metrics import Metrics
from tests.cache.support import LIMIT, Clock, OpenDisk, count, embedding, entries, held, key, present, run


def on_disk(directory: Path) -> int:
    """Bytes in files, except the one that SQLite uses as shared memory."""
    return sum(each.stat().st_size for each in directory.iterdir() if not each.name.endswith("-shm"))


async def test_what_was_put_in_comes_out_bit_for_bit(opened: OpenDisk, metrics: Metrics) -> None:
    store = opened()
    await store.put(entries(range(300)))
    keys = [key(number) for number in (299, 300, 0, 299)]
    assert await store.get(keys) == [embedding(299), None, embedding(0), embedding(299)]
    assert count(metrics, "disk", "set", "ok") == 300
    assert (count(metrics, "disk", "get", "hit"), count(metrics, "disk", "get", "miss")) == (3, 1)
    assert held(metrics, "disk") > 300 * 256
    assert store.status == "up"


async def test_it_survives_a_restart(opened: OpenDisk) -> None:
    first = opened()
    await first.put(entries([1, 2]))
    await first.close()
    assert await opened().get([key(1), key(2)]) == [embedding(1), embedding(2)]


async def test_it_survives_a_process_that_is_killed(opened: OpenDisk, path: Path) -> None:
    await run(KILLED, path)
    assert await present(opened(), *range(20)) == list(range(20))


KILLED = """
import asyncio, os, signal, sys
from app.cache.disk import DiskStore
from app.metrics import Metrics
from tests.cache.support import Clock, entries
async def main():
    store = DiskStore(sys.argv[1], 2**23, 86400, Clock(), Metrics())
    await store.put(entries(range(20)))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


async def test_a_look_up_has_its_turn_between_the_pieces_of_a_large_write(opened: OpenDisk) -> None:
    store = opened()
    await store.put(entries([0]))
    writing = asyncio.create_task(store.put(entries(range(1, 200), dimensions=1024)))
    await asyncio.sleep(0)
    assert await store.get([key(0)]) == [embedding(0)]
    assert not writing.done()
    await writing


async def test_values_that_leave_half_of_their_pages_empty_are_kept_in_a_full_file(
    opened: OpenDisk, metrics: Metrics
) -> None:
    store = opened(max_size=2**19)
    for first in range(0, 400, 20):
        await store.put(entries(range(first, first + 20), dimensions=520))
    assert count(metrics, "disk", "set", "ok") == 400
    assert await present(store, 399) == [399]


async def test_a_value_put_in_again_replaces_the_old_one(opened: OpenDisk) -> None:
    store = opened()
    await store.put([(key(1), embedding(7))])
    await store.put([(key(1), embedding(8))])
    assert await store.get([key(1)]) == [embedding(8)]


async def test_a_value_is_gone_when_its_time_is_over_even_after_a_restart(opened: OpenDisk, clock: Clock) -> None:
    first = opened(ttl=60)
    await first.put(entries([1]))
    clock.advance(59)
    assert await present(first, 1) == [1]
    await first.close()
    clock.advance(1)
    assert await present(opened(ttl=60), 1) == []


async def test_file_and_log_together_stay_within_the_bound(opened: OpenDisk, tmp_path: Path, clock: Clock) -> None:
    bound = 2**20
    store = opened(max_size=bound)
    for start in range(0, 1500, 50):
        clock.advance(1)
        await store.put(entries(range(start, start + 50), dimensions=1024))
        assert on_disk(tmp_path) <= bound
    assert store.status == "up"
    kept = await present(store, *range(1500))
    # The youngest, and about as many as the bound allows.
    assert kept == list(range(1500 - len(kept), 1500))
    assert len(kept) * 4096 > bound // 2


async def test_what_was_written_while_the_clock_was_ahead_does_not_outlive_what_is_used(
    opened: OpenDisk, clock: Clock
) -> None:
    used, ahead = range(50), range(100, 300)
    store = opened(max_size=2**20, ttl=30 * 86400)
    clock.advance(10 * 86400)
    await store.put(entries(ahead, dimensions=256))
    clock.advance(-10 * 86400)
    await store.put(entries(used, dimensions=256))
    for start in range(1000, 3000, 50):
        clock.advance(3600)
        assert await present(store, *used) == list(used)
        await store.put(entries(range(start, start + 50), dimensions=256))
    assert await present(store, *ahead) == []


async def test_correcting_what_was_written_while_the_clock_was_ahead_does_not_put_the_file_into_the_log(
    opened: OpenDisk, path: Path, clock: Clock
) -> None:
    bound = 2**22
    store = opened(max_size=bound, ttl=30 * 86400)
    clock.advance(10 * 86400)
    await store.put(entries(range(4000), dimensions=256))  # more than it holds
    clock.advance(-10 * 86400)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        reader.execute("BEGIN")  # so that what is written stays in the log
        (before,) = reader.execute("SELECT count(*) FROM embeddings").fetchone()
        await store.put(entries(range(4000, 4150), dimensions=256))
        log = path.with_name(path.name + "-wal").stat().st_size
        reader.execute("COMMIT")
        (after,) = reader.execute("SELECT count(*) FROM embeddings").fetchone()
    assert after < before + 150, "room was made"
    assert log < bound // 4


async def test_the_log_has_an_end_where_there_is_always_somebody_who_reads(
    opened: OpenDisk, path: Path, tmp_path: Path
) -> None:
    """SQLite alone restarts the write-ahead log only if no reader happens to be using it."""
    bound = 2**20
    store = opened(max_size=bound)
    await store.put(entries([0]))
    over = Event()

    def reader() -> sqlite3.Connection:
        return sqlite3.connect(path, isolation_level=None)

    def read() -> None:
        with closing(reader()) as one, closing(reader()) as other:
            one.execute("BEGIN")
            one.execute("SELECT max(id) FROM embeddings").fetchone()
            while not over.is_set():
                other.execute("BEGIN")
                other.execute("SELECT max(id) FROM embeddings").fetchone()
                one.execute("COMMIT")
                one, other = other, one

    reading = asyncio.create_task(asyncio.to_thread(read))
    for start in range(0, 1500, 50):
        await store.put(entries(range(start, start + 50), dimensions=1024))
    size = on_disk(tmp_path)
    over.set()
    await reading
    assert size <= bound * 2
    assert store.status == "up"


def test_a_reader_that_stays_is_waited_for_now_and_then(path: Path) -> None:
    """For example a suspended process or a backup: waiting for it at each write would hold up all lookups."""
    bound, waits = 2**20, 0

    def count_waits(statement: str) -> None:
        nonlocal waits
        waits += "wal_checkpoint" in statement

    table = Table(str(path), bound, 60, time.time)
    table._db.execute("PRAGMA busy_timeout = 0")
    table._db.set_trace_callback(count_waits)
    value, wal = bytes(20_000), path.with_name(path.name + "-wal")
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT max(id) FROM embeddings").fetchone()
        for number in range(100):
            table.write([(key(number), value)])
        assert wal.stat().st_size > 2 * bound, "nothing can end it"
        assert 3 <= waits <= 5, "each time it is twice as long"
    for number in range(100):
        table.write([(key(number), value)])
    assert wal.stat().st_size <= bound // 4
    table.close()


async def test_values_of_every_size_stay_within_the_bound(opened: OpenDisk, tmp_path: Path, clock: Clock) -> None:
    bound = 2**20
    store = opened(max_size=bound)
    for number in range(400):
        clock.advance(1)
        await store.put(entries([number], dimensions=(16, 900, 1000, 1100, 3072)[number % 5]))
        assert on_disk(tmp_path) <= bound
    assert store.status == "up"
    assert await present(store, 399) == [399]


async def test_what_is_read_again_outlives_what_is_not(opened: OpenDisk, clock: Clock) -> None:
    store = opened(max_size=2**20)
    await store.put(entries(range(100), dimensions=1024))
    clock.advance(7200)
    assert await present(store, 3) == [3]
    for start in range(100, 200, 20):
        clock.advance(1)
        await store.put(entries(range(start, start + 20), dimensions=1024))
    assert await present(store, *range(20)) == [3]
    for start in range(200, 400, 20):
        clock.advance(1)
        await store.put(entries(range(start, start + 20), dimensions=1024))
    assert await present(store, 3) == [], "as used as it was when it was read, and not with every write since"


async def test_a_smaller_bound_than_last_time_shrinks_the_file(opened: OpenDisk, tmp_path: Path) -> None:
    large = opened(max_size=8 * 2**20)
    await large.put(entries(range(900), dimensions=1024))
    await large.close()
    small = opened(max_size=2**20)
    await small.open()
    assert on_disk(tmp_path) <= 2**20
    assert small.status == "up"
    assert await present(small, 899) == [899]


async def test_a_file_behind_a_link_counts_with_its_log(opened: OpenDisk, path: Path, metrics: Metrics) -> None:
    there = path.with_name("there")
    there.mkdir()
    path.symlink_to(there / path.name)
    await opened().put(entries(range(10)))
    assert held(metrics, "disk") == on_disk(there)


async def test_two_processes_share_one_file(opened: OpenDisk, path: Path, metrics: Metrics) -> None:
    store = opened(max_size=2**22)
    await store.open()
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SECOND, str(path), cwd=Path(__file__).parents[2], stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(LIMIT * 3):
        # Both write at the same time until both are done.
        for number in range(0, 400, 10):
            await store.put(entries(range(number, number + 10)))
            await store.get([key(1000 + number)])
        output, _ = await other.communicate()
    assert output.decode().split() == ["400", "up"]
    assert await present(store, *range(400), *range(1000, 1400)) == [*range(400), *range(1000, 1400)]
    assert count(metrics, "disk", "set", "ok") == 400
    assert count(metrics, "disk", "set", "error") == 0


SECOND = """
import asyncio, sys
from app.cache.disk import DiskStore
from app.metrics import Metrics
from tests.cache.support import Clock, count, entries, key
async def main():
    metrics = Metrics()
    store = DiskStore(sys.argv[1], 2**22, 86400, Clock(), metrics, timeout=20)
    for number in range(1000, 1400, 10):
        await store.put(entries(range(number, number + 10)))
        await store.get([key(number - 1000)])
    print(int(count(metrics, "disk", "set", "ok")), store.status)
    await store.close()
asyncio.run(main())
"""


def test_a_file_that_another_process_makes_meanwhile_is_ours(path: Path) -> None:
    class Late(Table):
        def _pragma(self, name: str) -> int:
            said = super()._pragma(name)
            if not others:
                others.append(Table(str(path), 2**20, 60, time.time))
            return said

    others: list[Table] = []
    late = Late(str(path), 2**20, 60, time.time)
    late.write([(b"key", b"value")])
    assert others[0].read([b"key"]) == [b"value"]
    for each in (late, *others):
        each.close()


async def test_only_its_owner_may_read_the_file(opened: OpenDisk, path: Path) -> None:
    await opened().open()
    assert path.stat().st_mode & 0o077 == 0
