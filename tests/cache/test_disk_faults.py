# ruff: noqa: ASYNC221, ASYNC240  # a test may block its own event loop
"""The disk tier with a faulty file: it costs hits, never a request."""

import asyncio
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from app.cache import disk
from app.cache.table import Table
from app.metrics import Metrics
from tests.cache.support import Clock, OpenDisk, count, entries, key, present, run


async def test_a_value_that_was_tampered_with_is_a_miss_and_is_overwritten(
    opened: OpenDisk, path: Path, metrics: Metrics
) -> None:
    store = opened()
    await store.put(entries([1, 2]))
    with sqlite3.connect(path) as other:
        value = other.execute("SELECT value FROM embeddings WHERE key = ?", (key(2),)).fetchone()[0]
        other.execute("UPDATE embeddings SET value = ? WHERE key = ?", (value, key(1)))
    other.close()
    assert await present(store, 1, 2) == [2]
    assert count(metrics, "disk", "get", "corrupt") == 1
    await store.put(entries([1]))
    assert await present(store, 1) == [1]


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\0" + b"\xff" * 8192])
async def test_a_broken_file_is_moved_aside_and_replaced(
    opened: OpenDisk, path: Path, content: bytes, link: bool, caplog: pytest.LogCaptureFixture
) -> None:
    place = path.with_suffix(".elsewhere") if link else path
    if link:
        path.symlink_to(place)
    path.write_bytes(content)
    store = opened()
    with caplog.at_level(logging.WARNING):
        assert await present(store, 1) == []
        await store.put(entries([1]))
    assert await present(store, 1) == [1]
    assert Path(f"{place}.corrupt").read_bytes() == content
    assert path.is_symlink() == link
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert store.status == "up"


async def test_a_file_that_could_not_be_read_for_once_stays_where_it_is(
    opened: OpenDisk, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    await store.put(entries([1]))
    read, failed = Table.read, iter([1, 2])

    def sometimes(table: Table, keys: Sequence[bytes]) -> list[bytes | None]:
        if next(failed, None):
            error = sqlite3.DatabaseError("database disk image is malformed")  # what SQLite raises on EIO
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
        return read(table, keys)

    monkeypatch.setattr(Table, "read", sometimes)
    assert await present(store, 1) == [1]
    assert list(path.parent.glob("*.corrupt*")) == []


async def test_what_was_moved_aside_stays(opened: OpenDisk, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    documents = [b"somebody's document, by a slip %d" % number * 100 for number in range(12)]
    for content in documents:
        path.write_bytes(content)
        store = opened()
        await store.put(entries([1]))
        await store.close()
    kept = [Path(f"{path}.corrupt{number}").read_bytes() for number in ("", *range(2, 10))]
    assert kept == [*documents[:8], documents[-1]], "nine, and the last one then takes the place of the one before"
    assert [record.message.rsplit(None, 1)[1] for record in caplog.records][:2] == [
        f"{path}.corrupt",
        f"{path}.corrupt2",
    ]


async def test_of_our_own_broken_files_the_last_one_alone_is_kept(opened: OpenDisk, path: Path) -> None:
    document = b"somebody's document, by a slip" * 100
    path.write_bytes(document)
    for number in range(4):
        store = opened()
        await store.put(entries([number]))
        await store.close()
        broken = b"x" * 100 + path.read_bytes()[100:]
        path.write_bytes(broken)
    store = opened()
    assert await present(store, 3) == []
    assert sorted(path.parent.glob("*.corrupt*")) == [Path(f"{path}.corrupt"), Path(f"{path}.corrupt2")]
    assert Path(f"{path}.corrupt").read_bytes() == document
    assert Path(f"{path}.corrupt2").read_bytes() == broken


async def test_a_file_that_breaks_while_it_is_used_is_replaced(opened: OpenDisk, path: Path) -> None:
    first = opened()
    await first.put(entries(range(200), dimensions=1024))
    await first.close()
    # The first page, with the schema, stays intact; the rest is noise.
    raw = path.read_bytes()
    path.write_bytes(raw[:4096] + os.urandom(len(raw) - 4096))
    store = opened()
    await store.get([key(number) for number in range(200)])
    await store.put(entries([1]))
    assert await present(store, 1) == [1]
    assert store.status == "up"


async def test_a_file_that_was_deleted_is_made_anew(
    opened: OpenDisk, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each store that has it open does so in turn, and none deletes another's new file."""
    stores = opened(), opened()
    for number, store in enumerate(stores):
        await store.put(entries([number]))
    for file in path.parent.iterdir():
        file.unlink()
    for number, store in enumerate(stores, 2):
        await store.put(entries([number]))
    assert await present(opened(), 0, 1, 2, 3) == [2, 3]
    assert await present(stores[0], 2, 3) == await present(stores[1], 2, 3) == [2, 3]
    assert caplog.messages == [f"disk cache: {path} has been deleted or replaced; reopening it"] * 2


@pytest.mark.parametrize("link", [False, True])
async def test_the_log_of_a_file_that_was_deleted_or_replaced_is_not_taken_for_its_successors(
    link: bool, opened: OpenDisk, path: Path
) -> None:
    """Even while another process, which has nothing to write, keeps using the old file."""
    if link:
        path.symlink_to(path.with_suffix(".elsewhere"))
    file = path.resolve()
    store = opened()
    for number in range(2):
        await store.put(entries([number]))
        other = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOLD, str(path), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert other.stdout is not None
        assert await other.stdout.readline() == b"1\n"
        if number:
            shutil.copy(path, path.with_suffix(".copy"))
            path.with_suffix(".copy").replace(file)
        else:
            file.unlink()
        await store.put(entries(range(10, 30)))
        assert store.status == "up"
        assert await present(store, *range(10, 30)) == [*range(10, 30)]
        assert (await other.communicate(b"."))[0] == b"1\n"


HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1])
for _ in range(2):
    print(len(database.execute("SELECT key FROM embeddings LIMIT 1").fetchall()), flush=True)
    sys.stdin.read(1)
"""


async def test_another_programs_database_is_left_alone(opened: OpenDisk, path: Path, metrics: Metrics) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE invoices (id)")
    other.close()
    store = opened()
    assert await present(store, 1) == []
    assert "another program's database" in store.status
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("invoices",)]
    other.close()


async def test_a_path_that_cannot_be_is_logged_once_and_the_tier_is_off(
    opened: OpenDisk, tmp_path: Path, clock: Clock, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = opened(tmp_path / "file" / "embeddings.sqlite3")
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            assert await present(store, 1) == []
    assert store.status.startswith("down: ")
    assert len(caplog.records) == 1
    assert count(metrics, "disk", "get", "error") == 3
    assert count(metrics, "disk", "get", "skipped") == 7
    await store.put(entries([1]))
    assert count(metrics, "disk", "set", "skipped") == 1

    (tmp_path / "file").unlink()
    clock.advance(1)
    assert await present(store, 1) == []
    assert store.status == "up"
    await store.put(entries([1]))
    assert await present(store, 1) == [1]


async def test_opening_ahead_tells_what_is_wrong_before_the_first_request(opened: OpenDisk, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = opened(tmp_path / "file" / "embeddings.sqlite3")
    await store.open()
    assert store.status.startswith("down: ")


async def test_a_full_disk_drops_writes_and_goes_on_reading(path: Path) -> None:
    # A limit on the size of a process's files is the nearest thing to a full disk that every machine has.
    ended = await run(FULL, path)
    assert ended.stdout.split() == ["[0]", "error", "writes", "fail"], ended.stderr
    assert ended.stderr.count("set fails") == 1


FULL = """
import asyncio, resource, signal, sys
from app.cache.disk import DiskStore
from app.metrics import Metrics
from tests.cache.support import Clock, count, entries, key
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
async def main():
    metrics = Metrics()
    store = DiskStore(sys.argv[1], 2**24, 86400, Clock(), metrics, timeout=20)
    await store.put(entries([0]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))
    for start in range(1, 400, 20):
        await store.put(entries(range(start, start + 20), dimensions=1024))
    found = await store.get([key(0)])
    print([number for number, value in enumerate(found) if value])
    print("error" if count(metrics, "disk", "set", "error") > 100 else "none")
    print("writes fail" if store.status.startswith("up; writes fail") else store.status)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await store.close()
import logging
logging.basicConfig()
asyncio.run(main())
"""


_MOUNTS_1_MIB = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
_MOUNTS_1_MIB += ['mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"']


async def test_a_file_system_that_is_smaller_than_the_bound_is_the_bound(tmp_path: Path) -> None:
    if subprocess.run([*_MOUNTS_1_MIB, tmp_path, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system of his own")
    ended = await run(SMALL, tmp_path / "embeddings.sqlite3", *_MOUNTS_1_MIB, str(tmp_path))
    assert ended.stdout.split() == ["[599]", "0", "up"], ended.stderr
    assert ended.stderr.splitlines() == [
        "WARNING:app.cache.disk:disk cache: max_size is more than seven eighths of the file system: using 917504 bytes"
    ]


SMALL = """
import asyncio, logging, sys
from app.cache.disk import DiskStore
from app.metrics import Metrics
from tests.cache.support import Clock, count, entries, present
async def main():
    metrics = Metrics()
    store = DiskStore(sys.argv[1], 2**31, 86400, Clock(), metrics, timeout=20)
    await store.open()
    for start in range(0, 600, 20):
        await store.put(entries(range(start, start + 20), dimensions=1024))
    print(await present(store, 599), int(count(metrics, "disk", "set", "error")), store.status)
    await store.close()
logging.basicConfig()
asyncio.run(main())
"""


async def test_the_event_loop_turns_while_another_process_holds_the_file(opened: OpenDisk, path: Path) -> None:
    store = opened()
    await store.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(store.put(entries([1])))
    turns = 0
    while not writing.done():
        await asyncio.sleep(0)
        turns += 1
    other.execute("ROLLBACK")
    other.close()
    assert turns > 10
    assert store.status == "up; writes fail: OperationalError: database is locked"
    await store.put(entries([1]))
    assert await present(store, 1) == [1]
    assert store.status == "up"


async def test_a_file_that_another_process_holds_is_not_written_to_again_and_again_while_look_ups_wait(
    opened: OpenDisk, path: Path, metrics: Metrics, clock: Clock
) -> None:
    store = opened()
    await store.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for number in range(5):
        await store.put(entries([number]))
    assert [count(metrics, "disk", "set", result) for result in ("error", "skipped")] == [3, 2]
    other.execute("ROLLBACK")
    other.close()
    clock.advance(1)
    await store.put(entries([9]))
    assert await present(store, 9) == [9]
    assert store.status == "up"


async def test_a_disk_that_does_not_answer_does_not_hold_up_the_end_and_is_told_of(
    opened: OpenDisk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers, close = threading.Event(), Table.close

    def late(table: Table) -> None:
        answers.wait(60)
        close(table)

    monkeypatch.setattr(disk, "_CLOSE_TIMEOUT", 0.05)
    monkeypatch.setattr(Table, "close", late)
    store = opened()
    assert await present(store, 1) == []
    try:
        await store.close()
    finally:
        answers.set()
    assert caplog.messages[-1:] == ["disk cache: not closed cleanly: no answer within 0.05 s"]
