"""One SQLite file of keys and opaque values, bounded in bytes with its write-ahead log. Blocks; for one thread.

Knows neither embeddings nor the event loop. Several processes may have the file open. Raises `sqlite3.Error` and
`OSError`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

_APPLICATION = 0x65_67_77_31
"""Marks a file as ours (SQLite's application_id): a slip in the configuration must not write into another's."""
_BUSY = 0.5
"""Seconds to wait for another process's write."""
_TOUCH = 3600.0
"""Seconds until a value that is read counts as used again: a look-up does not cost a write each time."""
_MOST_TOUCHED = 10_000
"""Values that are remembered as used again until the next write, at most."""
_ROW = 640
"""Bytes a row takes besides its value, at most: key twice, indexes, and what its last page leaves empty on average."""
_ASIDE = 9
"""Broken files that are kept, where only one is certainly ours."""
_PAGE = 2**16
"""Bytes of a file's first page, at most."""
_LOG = ("-wal", "-shm")
"""What SQLite keeps beside the file."""
_EVICT = 16
"""Rows to let go at a time."""

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
    """Whether the file itself is broken or no database, and opening it again will not help."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_held(error: BaseException) -> bool:
    """Whether another process had the file to itself for longer than is waited."""
    return _code(error) == sqlite3.SQLITE_BUSY


def _code(error: BaseException) -> int:
    """SQLite's primary one, 0 for what is none of its errors."""
    code: int = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code


class Table:
    """The file at `path`, made if need be. Values count as absent `ttl` seconds after they were written, and when
    `max_size` bytes are near, those used least recently go. `now` gives seconds since the epoch."""

    def __init__(self, path: str, max_size: int, ttl: float, now: Callable[[], float]) -> None:
        self._path = path
        self._ttl = ttl
        self._now = now
        self._touched: set[int] = set()
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(0o600)
        self._inode = file.stat().st_ino
        beside = str(file.resolve())  # SQLite keeps its log there, where the path is a link
        self._wal = beside + "-wal"
        self._db = sqlite3.connect(path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(max_size)
        except BaseException:
            self._db.close()
            raise
        self._log = {beside + suffix: _inode(beside + suffix) for suffix in _LOG}

    def _prepare(self, max_size: int) -> None:
        # Asked in this order: another process that makes the file meanwhile marks it as ours before it has tables.
        has_tables = self._pragma("schema_version")
        if self._pragma("application_id") != _APPLICATION:
            if has_tables:
                raise sqlite3.OperationalError("the file is another program's database")
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
        self._db.execute("PRAGMA journal_mode = WAL")
        # A crash of the machine may lose the last writes, which a cache may; the file stays whole.
        self._db.execute("PRAGMA synchronous = NORMAL")
        # Some builds overwrite what is deleted, which would send every evicted page through the log.
        self._db.execute("PRAGMA secure_delete = OFF")
        self._page = self._pragma("page_size")
        # Three quarters for the file, one eighth for the log before it is folded in, one for the transaction that
        # comes on top of it.
        self._limit = max(max_size * 3 // 4 // self._page, 16)
        self._longest_log = max_size // 4
        self._in_vain = 0
        """Bytes of the log when look-ups in it were last waited for in vain: one that is suspended stays. Our own wait
        meanwhile, so that is not done with each write."""
        log = max(min(max_size // 8 // self._page, 1000), 4)
        self._db.execute(f"PRAGMA wal_autocheckpoint = {log}")
        self._db.execute(f"PRAGMA journal_size_limit = {log * self._page}")
        self.write_size = max(min(max_size // 24, 2**20), 1)
        """Bytes to hand to one `write` at most."""
        self._db.executescript(_SCHEMA)
        if self._pragma("page_count") > self._limit:  # the configuration has become smaller
            self._transaction(lambda: self._make_room(0))
            # As a script: `execute` takes one step, and each step gives back one page.
            self._db.executescript("PRAGMA incremental_vacuum")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.execute(f"PRAGMA max_page_count = {self._limit}")

    @property
    def size(self) -> int:
        """Bytes on disk, the log included."""
        return _size(self._path) + _size(self._wal)

    @property
    def gone(self) -> bool:
        """Whether the file was deleted or replaced: SQLite goes on with it, unseen, and it ends with the process."""
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
            if row[1] + _TOUCH <= now and len(self._touched) < _MOST_TOUCHED:
                self._touched.add(row[0])
            values.append(row[3])
        return values

    def write(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Keeps these, all or none, in place of what their keys had, and lets the least recently used go for them."""
        needed = sum(len(value) + _ROW for _, value in rows)
        try:
            self._transaction(lambda: self._insert(rows, needed))
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                raise
            # Rows that spread worse than reckoned. If it is the disk that is full, this fails as well.
            self._transaction(lambda: self._make_room(needed * 2))
            self._transaction(lambda: self._insert(rows, needed))
        self._end_log()

    def _end_log(self) -> None:
        """Other processes' look-ups may have been in the way each time that SQLite would have begun the log anew: it
        does not wait for them by itself, and where there is always one the log has no end."""
        log = _size(self._wal)
        if log < self._in_vain:
            self._in_vain = 0
        if log > max(self._longest_log, 2 * self._in_vain):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._in_vain = _size(self._wal)

    def close(self) -> None:
        """Writes down what was used, folds the log in, closes. The log of a file that is gone is removed before that:
        a new file would be read with it for as long as another process has it open."""
        if self.gone:
            for each, inode in self._log.items():
                if inode is not None and _inode(each) == inode:
                    Path(each).unlink(missing_ok=True)
        with suppress(sqlite3.Error):
            self._transaction(self._touch)
        self._db.close()

    def set_aside(self) -> Path | None:
        """Closes, and moves a broken file aside, unless another process has already put a new one there."""
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
        pages = needed // self._page + 1
        if self._used() + pages <= self._limit:
            return
        # A little more than needed, so that not every write evicts.
        target = max(self._limit - pages - self._limit // 32, 0)
        while self._used() > target:
            gone = self._db.execute(
                "DELETE FROM embeddings WHERE id IN (SELECT id FROM embeddings ORDER BY used, id LIMIT ?)",
                (_EVICT,),
            )
            if not gone.rowcount:
                return

    def _used(self) -> int:
        """Pages that hold something."""
        return self._pragma("page_count") - self._pragma("freelist_count")

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    def _transaction(self, work: Callable[[], None]) -> None:
        # IMMEDIATE waits for its turn here; a read that turns into a write could not wait and would fail.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            work()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def set_aside(path: str, inode: int | None = None) -> Path | None:
    """Moves the file (where the path is a link, the file that it leads to) to `….corrupt` and removes its log; with
    `inode`, only if it is still that file. Returns where it is now, if it was moved. Files set aside earlier are
    removed if they are ours, so that broken ones do not add up. If not, one may be somebody's document, named by a slip
    in the configuration: it stays, until there are `_ASIDE` of them."""
    path = str(Path(path).resolve())
    with suppress(FileNotFoundError):
        if inode is None or _inode(path) == inode:
            places = [Path(f"{path}.corrupt{number}") for number in ("", *range(2, _ASIDE + 1))]
            for each in places:
                if _is_ours(each):
                    each.unlink(missing_ok=True)
            place = next((each for each in places if not each.exists()), places[-1])
            Path(path).replace(place)
            for suffix in _LOG:
                Path(path + suffix).unlink(missing_ok=True)
            return place
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
    """Whether its first page still says that it is. SQLite keeps there how a table was made, word for word."""
    try:
        with file.open("rb") as content:
            return _COLUMNS.encode() in content.read(_PAGE)
    except OSError:
        return False
