"""One SQLite file of keys and opaque values, bounded in bytes including its write-ahead log. Blocking; for one thread.

Knows neither embeddings nor the event loop. Several processes may have the file open. Raises `sqlite3.Error` and
`OSError`.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_APPLICATION_ID = 0x65_67_77_31
"""Marks a file as ours (SQLite's application_id): a misconfigured path must not write into another's database."""
_BUSY_TIMEOUT = 0.5
"""Seconds to wait for another process's write."""
_TOUCH_INTERVAL = 3600.0
"""Seconds after which a read marks a value as used again, so that not every lookup costs a write."""
_MAX_TOUCHED = 10_000
"""Values remembered as used until the next write, at most."""
_ROW_OVERHEAD = 640
"""Bytes a row takes besides its value, at most: the key twice, indexes, and the average slack of its last page."""
_MAX_SET_ASIDE = 9
"""Files set aside that are kept, at most. Those known to be ours do not pile up."""
_MAX_PAGE_SIZE = 2**16
"""Bytes of a file's first page, at most."""
_SIDE_FILES = ("-wal", "-shm")
"""Suffixes of the files SQLite keeps beside the database."""
_EVICT_BATCH = 16
"""Rows evicted at a time."""

_COLUMNS = """(
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,
    used INTEGER NOT NULL,
    written INTEGER NOT NULL,
    value BLOB NOT NULL
)"""
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS embeddings {_COLUMNS};
CREATE INDEX IF NOT EXISTS by_use ON embeddings (used);
"""


def is_corrupt(error: BaseException) -> bool:
    """Whether the file itself is corrupt or not a database, so that reopening it will not help."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_held(error: BaseException) -> bool:
    """Whether another process held the lock for longer than `_BUSY_TIMEOUT`."""
    return _code(error) == sqlite3.SQLITE_BUSY


def _code(error: BaseException) -> int:
    """SQLite's primary result code; 0 for any other exception."""
    code: int = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code


class Table:
    """The file at `path`, created if missing. A value expires `ttl` seconds after it was written. As the size nears
    `max_size` bytes, or the size of a smaller file system, the least recently used values are evicted. `now` returns
    seconds since the epoch."""

    def __init__(self, path: str, max_size: int, ttl: float, now: Callable[[], float]) -> None:
        self._path = path
        self._ttl = ttl
        self._now = now
        self._touched: set[int] = set()
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(0o600)
        self._inode = file.stat().st_ino
        resolved = str(file.resolve())  # SQLite keeps its log beside the target of a link
        self._wal = resolved + "-wal"
        # A file system that is full has no room for the log either, which evicting needs. By its size, not by what is
        # free: one that others have filled must not cost the values that are there.
        if total := shutil.disk_usage(path).total:  # some do not tell
            max_size = min(max_size, total * 7 // 8)
        self.max_size = max_size
        """Bytes that the file may really take."""
        self._db = sqlite3.connect(path, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(max_size)
        except BaseException:
            self._db.close()
            raise
        self._side_files = {resolved + suffix: _inode(resolved + suffix) for suffix in _SIDE_FILES}

    def _prepare(self, max_size: int) -> None:
        # The order matters: another process creating the file meanwhile sets the application ID before the tables.
        has_tables = self._pragma("schema_version")
        if self._pragma("application_id") != _APPLICATION_ID:
            if has_tables:
                raise sqlite3.OperationalError("the file is another program's database")
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._db.execute("PRAGMA journal_mode = WAL")
        # A crash of the machine may lose the last writes, which a cache can afford; the file stays consistent.
        self._db.execute("PRAGMA synchronous = NORMAL")
        # Some builds overwrite deleted content by default, which would send every evicted page through the log.
        self._db.execute("PRAGMA secure_delete = OFF")
        self._page_size = self._pragma("page_size")
        # Three quarters for the file, one eighth for the log before a checkpoint, and one eighth for the transaction
        # that may come on top of it.
        self._max_pages = max(max_size * 3 // 4 // self._page_size, 16)
        self._max_log = max_size // 4
        self._blocked_log = 0
        """Bytes left in the log after the last truncating checkpoint; not 0 if readers blocked it. A suspended reader
        blocks it for good, and our own lookups wait during the attempt, so it is not repeated with each write."""
        log_pages = max(min(max_size // 8 // self._page_size, 1000), 4)
        self._db.execute(f"PRAGMA wal_autocheckpoint = {log_pages}")
        self._db.execute(f"PRAGMA journal_size_limit = {log_pages * self._page_size}")
        self.write_size = max(min(max_size // 24, 2**20), 1)
        """Bytes to hand to one `write`, at most."""
        self._db.executescript(_SCHEMA)
        if self._pragma("page_count") > self._max_pages:  # `max_size` has been reduced
            self._transaction(lambda: self._make_room(0))
            # As a script, because `execute` takes a single step and each step frees one page.
            self._db.executescript("PRAGMA incremental_vacuum")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.execute(f"PRAGMA max_page_count = {self._max_pages}")

    @property
    def size(self) -> int:
        """Bytes on disk, including the log."""
        return _size(self._path) + _size(self._wal)

    @property
    def gone(self) -> bool:
        """Whether the file was deleted or replaced. SQLite goes on using the unlinked file, which is lost at exit."""
        return _inode(self._path) != self._inode

    def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, or None."""
        now = int(self._now())
        values: list[bytes | None] = []
        for key in keys:
            row = self._db.execute("SELECT id, used, written, value FROM embeddings WHERE key = ?", (key,)).fetchone()
            if row is None or row[2] + self._ttl <= now:
                values.append(None)
                continue
            if row[1] + _TOUCH_INTERVAL <= now and len(self._touched) < _MAX_TOUCHED:
                self._touched.add(row[0])
            values.append(row[3])
        return values

    def write(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Inserts or replaces all rows or none, evicting the least recently used to make room."""
        needed = sum(len(value) + _ROW_OVERHEAD for _, value in rows)
        try:
            self._transaction(lambda: self._insert(rows, needed))
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            # The rows packed into pages worse than estimated. If the disk itself is full, this fails as well.
            self._transaction(lambda: self._make_room(needed * 2))
            self._transaction(lambda: self._insert(rows, needed))
        self._bound_log()

    def _bound_log(self) -> None:
        """Truncates the log if it has grown too long. SQLite's own checkpoints do not wait for readers in other
        processes: if there always is one, SQLite never restarts the log and it grows without bound."""
        log = _size(self._wal)
        if log < self._blocked_log:
            self._blocked_log = 0
        if log > max(self._max_log, 2 * self._blocked_log):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._blocked_log = _size(self._wal)

    def close(self) -> None:
        """Stores which values were used, checkpoints the log and closes. If the file is gone its log is removed first:
        a new file would be read with it for as long as another process has the log open."""
        if self.gone:
            for path, inode in self._side_files.items():
                if inode is not None and _inode(path) == inode:
                    Path(path).unlink(missing_ok=True)
        with suppress(sqlite3.Error):
            self._transaction(self._touch)
        self._db.close()

    def set_aside(self) -> Path | None:
        """Closes, and moves the corrupt file aside unless another process has already replaced it."""
        with suppress(sqlite3.Error):
            self._db.close()
        return set_aside(self._path, self._inode)

    def _insert(self, rows: Sequence[tuple[bytes, bytes]], needed: int) -> None:
        self._touch()
        self._make_room(needed)
        now = int(self._now())
        self._db.executemany(
            "INSERT INTO embeddings (key, used, written, value) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET"
            " used = excluded.used, written = excluded.written, value = excluded.value",
            [(key, now, now, value) for key, value in rows],
        )

    def _touch(self) -> None:
        if self._touched:
            now = int(self._now())
            self._db.executemany("UPDATE embeddings SET used = ? WHERE id = ?", [(now, row) for row in self._touched])
            self._touched.clear()

    def _make_room(self, needed: int) -> None:
        pages = needed // self._page_size + 1
        if self._used_pages() + pages <= self._max_pages:
            return
        # A little more than needed, so that not every write evicts.
        target = max(self._max_pages - pages - self._max_pages // 32, 0)
        while self._used_pages() > target:
            # Values used while the clock was ahead would outlive all others. As many are corrected as are evicted: all
            # at once, they could put the whole file into the log.
            now = int(self._now())
            self._db.execute(
                "UPDATE embeddings SET used = ? WHERE id IN (SELECT id FROM embeddings WHERE used > ? LIMIT ?)",
                (now, now, _EVICT_BATCH),
            )
            evicted = self._db.execute(
                "DELETE FROM embeddings WHERE id IN (SELECT id FROM embeddings ORDER BY used, id LIMIT ?)",
                (_EVICT_BATCH,),
            )
            if not evicted.rowcount:
                return

    def _used_pages(self) -> int:
        """Pages that are not on the free list."""
        return self._pragma("page_count") - self._pragma("freelist_count")

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    def _transaction(self, work: Callable[[], None]) -> None:
        # IMMEDIATE waits for the write lock here; a read upgraded to a write could not wait and would fail.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            work()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def set_aside(path: str, inode: int | None = None) -> Path | None:
    """Moves the file (if `path` is a link, its target) to `….corrupt` and removes its log; with `inode`, only if it is
    still that file. Returns the new path if it was moved. Files set aside earlier are removed if they are ours, so that
    corrupt files do not pile up. Any other may be somebody's document that the configuration named by mistake: it is
    kept, until there are `_MAX_SET_ASIDE` of them."""
    path = str(Path(path).resolve())
    with suppress(FileNotFoundError):
        if inode is None or _inode(path) == inode:
            candidates = [Path(f"{path}.corrupt{number}") for number in ("", *range(2, _MAX_SET_ASIDE + 1))]
            for candidate in candidates:
                if _is_ours(candidate):
                    candidate.unlink(missing_ok=True)
            target = next((candidate for candidate in candidates if not candidate.exists()), candidates[-1])
            Path(path).replace(target)
            for suffix in _SIDE_FILES:
                Path(path + suffix).unlink(missing_ok=True)
            return target
    return None


def _inode(path: str) -> int | None:
    with suppress(FileNotFoundError):
        return Path(path).stat().st_ino
    return None


def _size(path: str) -> int:
    with suppress(FileNotFoundError):
        return Path(path).stat().st_size
    return 0


def _is_ours(file: Path) -> bool:
    """Whether the first page holds our schema: SQLite keeps the text of each CREATE TABLE there, word for word."""
    try:
        with file.open("rb") as stream:
            return _COLUMNS.encode() in stream.read(_MAX_PAGE_SIZE)
    except OSError:
        return False
