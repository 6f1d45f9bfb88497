"""The tier that survives a restart: one SQLite file, accessed from a thread of its own.

A fault of the file costs hits, never a request: a corrupt file is set aside, and a full or forbidden disk switches the
tier off until it recovers.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from app.cache import table, values
from app.cache.breaker import Breaker
from app.cache.counts import Counts
from app.cache.health import TierHealth, describe_error
from app.cache.table import Table
from app.clock import Clock
from app.deadlines import Deadlines
from app.metrics import Metrics
from app.types import Embedding

log = logging.getLogger(__name__)

T = TypeVar("T")

_READ_BATCH = 128
"""Keys read in one job: other work gets the thread after a few milliseconds."""
_TRIES = 3
"""Attempts that must find the file corrupt before it counts as corrupt: SQLite also reports corruption after a
transient read error of the system (EIO). Pages read at the first attempt are not read again."""
_CLOSE_TIMEOUT = 5.0
"""Seconds closing may take; after that the file is left to SQLite's recovery."""


class DiskStore:
    """Values in the file `path`, at most `max_size` bytes with its log, each kept for `ttl` seconds of wall-clock time.

    `timeout`: seconds a lookup may take, including the wait for the thread. The disk counts as not answering only if
    the thread finishes no job at all in that time, for this lookup or another. Never raises.
    """

    name = "disk"
    at_once = 1
    """There is one thread: lookups that arrive while it is busy are merged."""

    def __init__(
        self, path: str, max_size: int, ttl: float, clock: Clock, metrics: Metrics, *, timeout: float = 1.0
    ) -> None:
        self._path = path
        self._open_table: Callable[[], Table] = lambda: Table(path, max_size, ttl, clock.time)
        self._max_size = max_size
        self._deadlines = Deadlines()
        self._timeout = timeout
        self._counts = Counts(metrics, self.name)
        self._bytes = metrics.cache_bytes.labels(self.name)
        self._breaker = Breaker(clock.monotonic)
        self._write_breaker = Breaker(clock.monotonic)
        """For writes alone: one that waits for another process's lock blocks the thread, and with it lookups."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache-disk")
        self._table: Table | None = None
        """Used by the thread alone."""
        self._jobs_done = 0
        """Jobs the thread has finished."""
        self._stuck_at = -1
        """`_jobs_done` when a lookup timed out: until it grows, no other lookup waits for the thread."""
        self._write_size = 2**16
        self._size = 0
        """Bytes on disk when the thread last opened the file or wrote to it."""
        self._closed = False
        self._health = TierHealth(self.name, clock.monotonic)

    @property
    def status(self) -> str:
        return self._health.status

    def time_limit(self, _keys: int, /) -> float:
        return self._timeout

    async def open(self) -> None:
        """Opens the file."""
        await self.get(())

    async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        """Reads in batches, as `put` writes. After a failure or a timeout the remaining keys count as not found."""
        found: list[Embedding | None] = []
        if self._jobs_done == self._stuck_at or not self._breaker.allow():
            self._counts.get_skipped.inc(len(keys))
        else:
            await self._look_up(keys, found)
        return found + [None] * (len(keys) - len(found))

    async def _look_up(self, keys: Sequence[bytes], found: list[Embedding | None]) -> None:
        """Appends the answers to `found`. The breaker has allowed this lookup and is told its outcome."""
        done_before = self._jobs_done
        try:
            with self._deadlines.io_timeout(self._timeout):
                for start in range(0, max(len(keys), 1), _READ_BATCH):
                    found += await self._get(keys[start : start + _READ_BATCH])
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        except TimeoutError:
            left = len(keys) - len(found)
            if self._jobs_done > done_before:  # the disk works: this lookup is large, or there are many others
                self._counts.get_skipped.inc(left)
                self._breaker.abandoned()
            else:
                self._stuck_at = done_before
                self._counts.get_timeout.inc(left)
                self._failed("get", f"no answer within {self._timeout:g} s")
        except Exception as error:  # a tier never raises
            self._counts.get_error.inc(len(keys) - len(found))
            self._failed("get", describe_error(error))
        else:
            self._succeeded("get")

    async def _get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        found, corrupt = await self._in_thread(lambda: self._read(keys))
        misses = sum(value is None for value in found) - corrupt
        self._counts.hit.inc(len(keys) - misses - corrupt)
        self._counts.miss.inc(misses)
        self._counts.get_corrupt.inc(corrupt)
        return found

    async def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> Sequence[tuple[bytes, Embedding]]:
        """Writes in batches, so that lookups get the thread between them. Returns what may be written later: what was
        not tried, or met a file that is locked or cannot be opened."""
        batch: list[tuple[bytes, Embedding]] = []
        left: list[tuple[bytes, Embedding]] = []
        size = 0
        for i, entry in enumerate(entries):
            batch.append(entry)
            size += entry[1].size
            if size >= self._write_size or i == len(entries) - 1:
                if not await self._put(batch):
                    left += batch
                batch, size = [], 0
        return left

    async def takes_writes(self) -> bool:
        if self._breaker.is_open:
            await self.open()  # a probe without values to lose, as is the next
        if self._write_breaker.is_open and not self._breaker.is_open:
            await self._put([])
        return not (self._breaker.is_open or self._write_breaker.is_open)

    async def close(self) -> None:
        """Closes the file, which keeps its values."""
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await asyncio.get_running_loop().run_in_executor(self._thread, self._close_table)
        except (TimeoutError, sqlite3.Error, OSError) as error:
            log.warning("disk cache: not closed cleanly: %s", str(error) or f"no answer within {_CLOSE_TIMEOUT:g} s")
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _put(self, entries: list[tuple[bytes, Embedding]]) -> bool:
        """Returns whether that was the last try. Has no time limit: nobody waits for it."""
        if not self._write_breaker.allow():
            self._counts.set_skipped.inc(len(entries))
            return False
        if not self._breaker.allow():
            self._write_breaker.abandoned()
            self._counts.set_skipped.inc(len(entries))
            return False
        try:
            await self._in_thread(lambda: self._write(entries))
        except asyncio.CancelledError:
            self._breaker.abandoned()
            self._write_breaker.abandoned()
            raise
        except Exception as error:  # a tier never raises
            held = table.is_held(error)
            (self._write_breaker.failed if held else self._write_breaker.abandoned)()
            self._counts.set_error.inc(len(entries))
            self._failed("set", describe_error(error))
            return not held and self._table is not None  # what a full disk refuses is not tried again
        else:
            self._write_breaker.succeeded()
            self._succeeded("set")
            self._counts.ok.inc(len(entries))
        return True

    async def _in_thread(self, job: Callable[[], T]) -> T:
        """Runs a job in the thread, in order of arrival. A job cancelled before its turn does not run."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, job)

    def _succeeded(self, operation: str) -> None:
        self._breaker.succeeded()
        self._health.recovered(operation)
        self._bytes.set(self._size)

    def _failed(self, operation: str, why: str) -> None:
        # A full disk refuses writes and can still be read: only failed lookups switch the tier off.
        if operation == "get" or self._table is None:
            self._breaker.failed()
        else:
            self._breaker.abandoned()
        self._health.failing(operation, why)

    # --- in the thread ------------------------------------------------------------------------------

    def _run(self, job: Callable[[], T]) -> T:
        """Runs a job. If every attempt finds the file corrupt, sets it aside and tries once more with a new file."""
        try:
            for _ in range(_TRIES):
                try:
                    return job()
                except sqlite3.DatabaseError as error:
                    if not table.is_corrupt(error):
                        raise
                    why = str(error)
            self._set_aside(why)
            return job()
        finally:
            self._jobs_done += 1

    def _set_aside(self, why: str) -> None:
        if self._table is None:
            moved_to = table.set_aside(self._path)
        else:
            corrupt, self._table = self._table, None
            moved_to = corrupt.set_aside()
        outcome = f"moved to {moved_to}" if moved_to else "another process has replaced it"
        log.error("disk cache: %s is broken (%s); %s", self._path, why, outcome)

    def _ensure_table(self) -> Table:
        if self._table is None:
            self._table = self._open_table()
            self._write_size = self._table.write_size
            self._size = self._table.size
            if self._table.max_size < self._max_size:
                self._max_size = self._table.max_size  # it is said once
                log.warning(
                    "disk cache: max_size is more than seven eighths of the file system: using %d bytes", self._max_size
                )
        return self._table

    def _read(self, keys: Sequence[bytes]) -> tuple[list[Embedding | None], int]:
        raws = self._ensure_table().read(keys)
        found = [None if raw is None else values.decode(key, raw) for key, raw in zip(keys, raws, strict=True)]
        return found, sum(value is None for value in found) - raws.count(None)

    def _write(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        if self._table is not None and self._table.gone:
            log.warning("disk cache: %s has been deleted or replaced; reopening it", self._path)
            self._close_table()
        opened = self._ensure_table()
        opened.write([(key, values.encode(key, embedding)) for key, embedding in entries])
        self._size = opened.size

    def _close_table(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None
