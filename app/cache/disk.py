"""The tier that survives a restart: one SQLite file, worked on by a thread of its own.

What goes wrong with the file costs hits, never a request: a broken one is set aside, a full or forbidden disk switches
the tier off until it recovers.
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

_KEYS_AT_ONCE = 128
"""Keys read in one go: others get their turn after a few milliseconds."""
_TRIES = 3
"""Times that the file is found broken until it counts as that: SQLite says so too of one that the system could not
read for once (EIO). What was read the first time is not read again."""
_CLOSE = 5.0
"""Seconds closing may take before the file is left to SQLite's recovery."""


class DiskStore:
    """Values in the file `path`, `max_size` bytes with its log, gone after `ttl` seconds by the wall clock.

    `timeout`: seconds a look-up may take, waiting for the thread included. Only where the thread finishes nothing in
    that time, for this look-up or another, does the disk count as not answering. Nothing is ever raised.
    """

    name = "disk"
    at_once = 1
    """There is one thread: look-ups that come while it is busy are read in one go."""

    def __init__(
        self, path: str, max_size: int, ttl: float, clock: Clock, metrics: Metrics, *, timeout: float = 1.0
    ) -> None:
        self._path = path
        self._open_table: Callable[[], Table] = lambda: Table(path, max_size, ttl, clock.time)
        self._deadlines = Deadlines()
        self._timeout = timeout
        self._counts = Counts(metrics, self.name)
        self._bytes = metrics.cache_bytes.labels(self.name)
        self._breaker = Breaker(clock.monotonic)
        self._writing = Breaker(clock.monotonic)
        """For writes alone: one that has to wait for another process's lock holds up the thread, and so look-ups."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache-disk")
        self._table: Table | None = None
        """Touched by the thread alone."""
        self._done = 0
        """Pieces of work that the thread has finished."""
        self._stuck = -1
        """What `_done` was when a look-up was given up: until it is more, no other look-up waits for the thread."""
        self._write_size = 2**16
        self._closed = False
        self._troubles = TierHealth(self.name)

    @property
    def status(self) -> str:
        return self._troubles.status

    def time_limit(self, _keys: int, /) -> float:
        return self._timeout

    async def open(self) -> None:
        """Opens the file."""
        await self.get(())

    async def get(self, keys: Sequence[bytes]) -> list[Embedding | None]:
        """In pieces, as `put`. Where one fails or the time is over, the rest counts as not found."""
        found: list[Embedding | None] = []
        if self._done == self._stuck or not self._breaker.allow():
            self._counts.get_skipped.inc(len(keys))
        else:
            await self._look_up(keys, found)
        return found + [None] * (len(keys) - len(found))

    async def _look_up(self, keys: Sequence[bytes], found: list[Embedding | None]) -> None:
        """Adds to `found` what it finds. The breaker has let this through and is told how it went."""
        done = self._done
        try:
            with self._deadlines.io_timeout(self._timeout):
                for start in range(0, max(len(keys), 1), _KEYS_AT_ONCE):
                    found += await self._get(keys[start : start + _KEYS_AT_ONCE])
        except asyncio.CancelledError:
            self._breaker.abandoned()
            raise
        except TimeoutError:
            left = len(keys) - len(found)
            if self._done > done:  # the disk works: this one asks for much, or others do
                self._counts.get_skipped.inc(left)
                self._breaker.abandoned()
            else:
                self._stuck = done
                self._counts.get_timeout.inc(left)
                self._failed("get", f"no answer within {self._timeout:g} s")
        except Exception as error:  # this tier's outermost door
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

    async def put(self, entries: Sequence[tuple[bytes, Embedding]]) -> None:
        """In pieces, so that look-ups get their turn between them."""
        piece: list[tuple[bytes, Embedding]] = []
        size = 0
        for place, entry in enumerate(entries):
            piece.append(entry)
            size += entry[1].size
            if size >= self._write_size or place == len(entries) - 1:
                await self._put(piece)
                piece, size = [], 0

    async def close(self) -> None:
        """Closes the file; what was written stays."""
        if self._closed:
            return
        self._closed = True
        try:
            async with asyncio.timeout(_CLOSE):
                await asyncio.get_running_loop().run_in_executor(self._thread, self._shut)
        except (TimeoutError, sqlite3.Error, OSError) as error:
            log.warning("disk cache: not closed in order: %s", str(error) or f"no answer within {_CLOSE:g} s")
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _put(self, entries: list[tuple[bytes, Embedding]]) -> None:
        """Not limited in time: nobody waits for it."""
        if not self._writing.allow():
            self._counts.set_skipped.inc(len(entries))
            return
        if not self._breaker.allow():
            self._writing.abandoned()
            self._counts.set_skipped.inc(len(entries))
            return
        try:
            size = await self._in_thread(lambda: self._write(entries))
        except asyncio.CancelledError:
            self._breaker.abandoned()
            self._writing.abandoned()
            raise
        except Exception as error:  # this tier's outermost door
            (self._writing.failed if table.is_held(error) else self._writing.abandoned)()
            self._counts.set_error.inc(len(entries))
            self._failed("set", describe_error(error))
        else:
            self._writing.succeeded()
            self._succeeded("set")
            self._counts.ok.inc(len(entries))
            self._bytes.set(size)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """In the thread, one after the other. Work that is cancelled before its turn is not done."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, work)

    def _succeeded(self, operation: str) -> None:
        self._breaker.succeeded()
        self._troubles.recovered(operation)

    def _failed(self, operation: str, why: str) -> None:
        # A full disk refuses writes and can still be read: only look-ups that fail switch the tier off.
        if operation == "get" or self._table is None:
            self._breaker.failed()
        else:
            self._breaker.abandoned()
        self._troubles.failing(operation, why)

    # --- in the thread ------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], T]) -> T:
        """Does it. A file that is found broken each time is set aside, and it is done once more, on a new one."""
        try:
            for _ in range(_TRIES):
                try:
                    return work()
                except sqlite3.DatabaseError as error:
                    if not table.is_corrupt(error):
                        raise
                    why = str(error)
            self._set_aside(why)
            return work()
        finally:
            self._done += 1

    def _set_aside(self, why: str) -> None:
        if self._table is None:
            place = table.set_aside(self._path)
        else:
            broken, self._table = self._table, None
            place = broken.set_aside()
        now = f"moved to {place}" if place else "another process has replaced it"
        log.error("disk cache: %s is broken (%s); %s", self._path, why, now)

    def _opened(self) -> Table:
        if self._table is None:
            self._table = self._open_table()
            self._write_size = self._table.write_size
            self._bytes.set(self._table.size)
        return self._table

    def _read(self, keys: Sequence[bytes]) -> tuple[list[Embedding | None], int]:
        raws = self._opened().read(keys)
        found = [None if raw is None else values.decode(key, raw) for key, raw in zip(keys, raws, strict=True)]
        return found, sum(value is None for value in found) - raws.count(None)

    def _write(self, entries: Sequence[tuple[bytes, Embedding]]) -> int:
        if self._table is not None and self._table.gone:
            log.warning("disk cache: %s is gone or another file; it is opened anew", self._path)
            self._shut()
        opened = self._opened()
        opened.write([(key, values.encode(key, embedding)) for key, embedding in entries])
        return opened.size

    def _shut(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None
