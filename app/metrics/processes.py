"""Metrics shared by several processes, through files that each writes and a scrape of any of them reads."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import mark_process_dead

log = logging.getLogger(__name__)

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that names the directory of these files, if metrics are shared."""
PROCESS_NAME = "EMBEDDING_GATEWAY_METRICS"
"""The variable that names a process's files in that directory, so that a restarted process continues its predecessor's:
otherwise each process would leave some behind for good."""
_INITIAL_SIZE = 2**16
"""Bytes of a new metrics file; the size doubles when the file is full."""
_ENTRY_OVERHEAD = 40
"""Bytes a series takes in such a file besides its name, at most."""


@contextlib.contextmanager
def multiprocess(directory: str) -> Iterator[None]:
    """Within the block, this process's scrapes cover all processes that it starts, and what it counts itself from here
    on, through files in this directory."""
    os.environ[DIRECTORY] = directory
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        del os.environ[DIRECTORY]
        values.ValueClass = values.MutexValue


def forget_process(name: str) -> None:
    """Called when a process has ended: its counters stay, its live gauges go."""
    mark_process_dead(name)  # type: ignore[no-untyped-call]


class _File(MmapedDict):
    """A process's metrics of one type, in a memory-mapped file that the others read. Writing where the disk has no
    room would kill the process (SIGBUS): blocks are allocated first, and series without room are not counted."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._capacity, self._positions = 0, {}

    def read_value(self, key: str) -> tuple[float, float]:
        """Called once per series, before it is written."""
        try:
            if not self._capacity:
                self._open()
            if self._used + len(key.encode()) + _ENTRY_OVERHEAD > self._capacity:
                with self._path.open("ab") as file:
                    file.write(bytes(self._capacity))
            return super().read_value(key)  # type: ignore[no-any-return, no-untyped-call]
        except OSError as error:
            _log_incomplete(self._path.parent, error.strerror)
            return 0.0, 0.0

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        if key in self._positions:
            super().write_value(key, value, timestamp)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        if self._capacity:
            super().close()  # type: ignore[no-untyped-call]

    def _open(self) -> None:
        if not self._path.exists():
            new = self._path.with_suffix(".new")  # nobody reads this suffix
            try:
                new.write_bytes(bytes(_INITIAL_SIZE))
                new.rename(self._path)
            finally:
                new.unlink(missing_ok=True)
        super().__init__(str(self._path))  # type: ignore[no-untyped-call]


@functools.cache
def _log_incomplete(directory: Path, reason: str) -> None:
    """Logs once per process."""
    log.error("metrics of this process are incomplete: %s: %s", directory, reason)


def recreate(directory: Path) -> None:
    """Recreates a directory that somebody has removed. Only processes that start afterwards are counted again."""
    if not directory.is_dir():
        _log_incomplete(directory, "it was removed; workers that had begun before count unseen")
        directory.mkdir(0o700, parents=True, exist_ok=True)


values.MmapedDict = _File  # type: ignore[attr-defined, assignment]
if (_process_name := os.environ.get(PROCESS_NAME)) and DIRECTORY in os.environ:
    values.ValueClass = values.MultiProcessValue(lambda: _process_name)  # type: ignore[no-untyped-call]
