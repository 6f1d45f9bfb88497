"""When the file is read again."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.config import Settings
from app.config.load import as_text
from app.config.source import ConfigSource, ParentConfig
from app.config.watch import POLL_INTERVAL, ConfigWatcher
from app.upstreams import UPSTREAMS
from tests.cache.support import LIMIT
from tests.clock import HandClock, settle
from tests.harness import no_descriptors, settings_of


class SlowSource(ConfigSource):
    """A file that takes as long to read as the test wants."""

    def __init__(self) -> None:
        self.loaded = (1, 1, 1, 1)
        self.now = (1, 1, 1, 1)
        self.reading = threading.Semaphore(0)
        self.times_read = 0

    def signature(self) -> tuple[int, int, int, int]:
        return self.now

    def load(self) -> Settings:
        self.reading.acquire()
        self.loaded = self.now
        self.times_read += 1
        return settings_of({"upstreams": {"built-in": {"type": "lexical"}}})


async def test_a_file_that_is_slow_to_read_is_read_once() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))  # what is read is read in order
    source, clock, read = SlowSource(), HandClock(), asyncio.Event()

    async def change(_settings: Settings) -> None:
        """Takes anything."""

    watching = asyncio.create_task(ConfigWatcher(source, clock, change, lambda _ok: read.set()).run())
    await settle()
    source.now = (2, 2, 2, 2)
    for _ in range(4):
        await clock.advance(POLL_INTERVAL)
    source.reading.release(2)
    await read.wait()
    await settle()
    await asyncio.to_thread(lambda: None)
    assert source.times_read == 1
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_link_that_is_turned_back_after_a_sighup_is_followed() -> None:
    """The file it led to before is the same as ever, to the nanosecond."""
    source, clock, read = SlowSource(), HandClock(), asyncio.Event()

    async def change(_settings: Settings) -> None:
        """Takes anything."""

    watcher = ConfigWatcher(source, clock, change, lambda _ok: read.set())
    watching = asyncio.create_task(watcher.run())
    source.reading.release(2)
    await settle()
    source.now = (2, 2, 2, 2)
    watcher.ask()
    await read.wait()
    await clock.advance(POLL_INTERVAL)
    read.clear()
    source.now = (1, 1, 1, 1)
    for _ in range(2):
        await clock.advance(POLL_INTERVAL)
    async with asyncio.timeout(LIMIT):
        await read.wait()
    assert source.loaded == (1, 1, 1, 1)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_changed_file_that_the_system_could_not_read_is_read_again(tmp_path: Path) -> None:
    file, clock, results = tmp_path / "gw.yaml", HandClock(), asyncio.Queue[bool]()
    file.write_text("upstreams: {built-in: {type: lexical}}\n")
    source = ConfigSource(str(file), {}, UPSTREAMS)
    source.load()
    given = list[Settings]()

    async def change(settings: Settings) -> None:
        given.append(settings)

    async def polls(count: int) -> None:
        for _ in range(count):
            await clock.advance(POLL_INTERVAL)

    watching = asyncio.create_task(ConfigWatcher(source, clock, change, results.put_nowait).run())
    await settle()
    file.write_text("upstreams: {changed: {type: lexical}}\n")
    with no_descriptors():
        await polls(2)
        assert await results.get() is False
    assert not given
    await polls(1)
    assert await asyncio.wait_for(results.get(), LIMIT) is True
    assert "changed" in given[0].upstreams
    await polls(3)
    assert results.empty()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


class Timeless(HandClock):
    """Nobody is to wait on it."""

    async def sleep(self, seconds: float) -> None:
        raise AssertionError(seconds)


async def test_a_worker_waits_for_its_parent_and_polls_nothing() -> None:
    settings = settings_of({"upstreams": {"built-in": {"type": "lexical"}}})
    given, read = list[Settings](), asyncio.Event()

    async def change(settings: Settings) -> None:
        given.append(settings)

    watcher = ConfigWatcher(ParentConfig(as_text(settings), UPSTREAMS), Timeless(), change, lambda _ok: read.set())
    watching = asyncio.create_task(watcher.run())
    await settle()
    assert not watching.done()
    watcher.ask()
    await read.wait()
    assert given == [settings]
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
