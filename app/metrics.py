"""All of the gateway's metrics. The only module that imports prometheus_client.

Label values are bounded: names from the configuration or discovery, our own enumerations, and `other`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import prometheus_client
from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LAG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_BATCH = (1, 2, 5, 10, 16, 20, 25, 32, 64, 100, 128, 256, 512, 1024, 2048)

log = logging.getLogger(__name__)

# Nobody reads the `_created` series, a second one for each counter with its start time.
disable_created_metrics()  # type: ignore[no-untyped-call]

__all__ = [
    "CONTENT_TYPE",
    "PROCESS_NAME",
    "BufferedCounter",
    "BufferedGauge",
    "BufferedHistogram",
    "ConfigMetrics",
    "Counter",
    "Histogram",
    "Metrics",
    "forget_process",
    "multiprocess",
]

_PREFIX = "embedding_gateway_"
_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
PROCESS_NAME = "EMBEDDING_GATEWAY_METRICS"
"""The variable that names a process's files in that directory, so that a restarted process continues its predecessor's:
otherwise each process would leave some behind for good."""
_INITIAL_SIZE = 2**16
"""Bytes of a new metrics file; the size doubles when the file is full."""
_ENTRY_OVERHEAD = 40
"""Bytes a series takes in such a file besides its name, at most."""
_Merge = Literal["livesum", "livemin", "livemax"]

_cached = functools.lru_cache(maxsize=4096)
"""Caches what was created for each tuple of label values, up to that many."""


@contextlib.contextmanager
def multiprocess(directory: str) -> Iterator[None]:
    """Within the block, this process's scrapes cover all processes that it starts, and what it counts itself from here
    on, through files in this directory."""
    os.environ[_DIRECTORY] = directory
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        del os.environ[_DIRECTORY]
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


def _recreate(directory: Path) -> None:
    """Recreates a directory that somebody has removed. Only processes that start afterwards are counted again."""
    if not directory.is_dir():
        _log_incomplete(directory, "it was removed; workers that had begun before count unseen")
        directory.mkdir(0o700, parents=True, exist_ok=True)


values.MmapedDict = _File  # type: ignore[attr-defined, assignment]
if (_process_name := os.environ.get(PROCESS_NAME)) and _DIRECTORY in os.environ:
    values.ValueClass = values.MultiProcessValue(lambda: _process_name)  # type: ignore[no-untyped-call]


class Histogram(prometheus_client.Histogram):
    """A histogram that can record many observations at once."""

    def add(self, counts: Sequence[int], total: float) -> None:
        """`counts`: the number of observations in each bucket; `total`: their sum."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)

    @property
    def bounds(self) -> Sequence[float]:
        """The upper bound of each bucket."""
        return self._upper_bounds


class BufferedSeries:
    """A series counted in plain numbers and flushed to prometheus_client later. Counting this way costs a tenth of
    doing it there, and changes that cancel out before the flush cost nothing. Not thread-safe."""

    __slots__ = ("_queue", "queued")

    def __init__(self, queue: FlushQueue) -> None:
        self._queue = queue
        self.queued = False
        """Whether it is in the queue."""

    def flush(self) -> None:
        """Passes on everything counted since the last flush."""
        raise NotImplementedError


class BufferedCounter(BufferedSeries):
    """A counter, or a gauge that is incremented and decremented."""

    __slots__ = ("_amount", "_child")

    def __init__(self, child: Counter | Gauge, queue: FlushQueue) -> None:
        super().__init__(queue)
        self._child, self._amount = child, 0.0

    def inc(self, amount: float = 1) -> None:
        self._amount += amount
        if not self.queued:
            self._queue.add(self)

    def dec(self, amount: float = 1) -> None:
        self.inc(-amount)

    def flush(self) -> None:
        amount, self._amount = self._amount, 0.0
        if amount:
            self._child.inc(amount)


class BufferedGauge(BufferedSeries):
    """A gauge that is set."""

    __slots__ = ("_child", "_value")

    def __init__(self, child: Gauge, queue: FlushQueue) -> None:
        super().__init__(queue)
        self._child, self._value = child, 0.0

    def set(self, value: float) -> None:
        self._value = value
        if not self.queued:
            self._queue.add(self)

    def flush(self) -> None:
        self._child.set(self._value)


class BufferedHistogram(BufferedSeries):
    """A histogram."""

    __slots__ = ("_bounds", "_child", "_counts", "_total")

    def __init__(self, child: Histogram, queue: FlushQueue) -> None:
        super().__init__(queue)
        self._child, self._bounds = child, child.bounds
        self._counts, self._total = [0] * len(self._bounds), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value
        if not self.queued:
            self._queue.add(self)

    def flush(self) -> None:
        self._child.add(self._counts, self._total)
        self._counts, self._total = [0] * len(self._bounds), 0.0


class FlushQueue:
    """The series with unflushed counts. They are flushed before this process's metrics are read; where another process
    may read them (several workers share theirs), at the end of each turn of the event loop."""

    def __init__(self, *, multiprocess: bool) -> None:
        self._multiprocess = multiprocess
        self._pending: list[BufferedSeries] = []
        self._scheduled = False

    def add(self, series: BufferedSeries) -> None:
        series.queued = True
        self._pending.append(series)
        if self._multiprocess and not self._scheduled:
            with contextlib.suppress(RuntimeError):  # no loop yet: flushed with the next series, or when read
                asyncio.get_running_loop().call_soon(self.flush)
                self._scheduled = True

    def flush(self) -> None:
        self._scheduled = False
        pending, self._pending = self._pending, []
        for series in pending:
            series.queued = False
            series.flush()


class ConfigMetrics:
    """Whether the configuration is in force. With several processes, the one that reads it has these metrics too."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.config_valid = Gauge(
            _PREFIX + "config_valid",
            "1 while the configuration is the one in force, 0 after a bad one.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.config_valid.set(1)
        self.config_reloads = Counter(
            _PREFIX + "config_reloads_total",
            "Times the configuration was read again.",
            ["result"],
            registry=registry,
        )

    def reloaded(self, valid: bool) -> None:
        """Records a reload: the configuration is now in force, or invalid."""
        self.config_valid.set(valid)
        self.config_reloads.labels("ok" if valid else "failed").inc()


class Metrics(ConfigMetrics):
    """The gateway's metrics. One instance per gateway; two gateways in one process share nothing."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._flush_queue = FlushQueue(multiprocess=_DIRECTORY in os.environ)
        super().__init__(registry)

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(_PREFIX + name, help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, *labels: str, merge: _Merge = "livesum") -> Gauge:
            return Gauge(_PREFIX + name, help_text, labels, registry=registry, multiprocess_mode=merge)

        def histogram(name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(_PREFIX + name, help_text, labels, registry=registry, buckets=buckets)

        self.requests = counter("requests_total", "Embedding requests answered.", "model", "status", "client")
        self.request_duration = histogram(
            "request_duration_seconds", "From the first byte in until the answer is ready.", _LATENCY, "model"
        )
        self.inputs = counter("inputs_total", "Inputs answered, by where the vector came from.", "model", "source")
        self.tokens = counter(
            "tokens_total", "Tokens: billed by an upstream, or spared.", "model", "upstream", "source"
        )
        self.upstream_requests = counter(
            "upstream_requests_total", "Calls to upstreams.", "upstream", "model", "outcome"
        )
        self.upstream_request_duration = histogram(
            "upstream_request_duration_seconds", "One upstream call.", _LATENCY, "upstream", "model"
        )
        self.upstream_batch_inputs = histogram(
            "upstream_batch_inputs", "Inputs in one upstream call.", _BATCH, "upstream", "model"
        )
        self.upstream_retries = counter("upstream_retries_total", "Calls that were retried.", "upstream", "reason")
        self.upstream_available = gauge(
            "upstream_available", "1 while the deployment takes traffic.", "upstream", "model", merge="livemax"
        )
        self.cache_operations = counter(
            "cache_operations_total", "Values read from or written to a tier.", "tier", "operation", "result"
        )
        self.cache_bytes = gauge("cache_bytes", "Bytes a tier holds, in the largest process.", "tier", merge="livemax")
        self.inflight_requests = gauge("inflight_requests", "Requests in flight.")
        self.queued_inputs = gauge("queued_inputs", "Inputs waiting for an upstream slot.", "upstream", "lane")
        self.rejected_requests = counter(
            "rejected_requests_total", "Requests refused, abandoned, or whose answer was not taken.", "reason"
        )
        self.cost = counter("cost_total", "Billed tokens times the price.", "model", "upstream", "currency")
        self.loop_lag = histogram(
            "event_loop_lag_seconds", "How late the event loop came back to a timer: time nobody was served.", _LAG
        )
        self.log_dropped = counter(
            "log_lines_dropped_total", "Request lines dropped because the log could not be written."
        )

        if _DIRECTORY not in os.environ:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)

    def buffered_counter(self, child: Counter | Gauge) -> BufferedCounter:
        """For a metric counted with every request."""
        return BufferedCounter(child, self._flush_queue)

    def buffered_counters(self, counter: Counter) -> Callable[..., BufferedCounter]:
        """`buffered_counter` by label values, each bound to its series once: binding costs more than counting."""
        return _cached(lambda *labels: self.buffered_counter(counter.labels(*labels)))

    def buffered_gauge(self, child: Gauge) -> BufferedGauge:
        """For a metric set with every request."""
        return BufferedGauge(child, self._flush_queue)

    def buffered_histogram(self, child: Histogram) -> BufferedHistogram:
        """For a metric observed with every request."""
        return BufferedHistogram(child, self._flush_queue)

    def buffered_histograms(self, histogram: Histogram) -> Callable[..., BufferedHistogram]:
        """`buffered_histogram` by label values, as `buffered_counters`."""
        return _cached(lambda *labels: self.buffered_histogram(histogram.labels(*labels)))

    def show_deployment(self, upstream: str, model: str, available: bool) -> None:
        """Records whether a configured deployment takes traffic."""
        self.upstream_available.labels(upstream, model).set(available)

    def forget_deployment(self, upstream: str, model: str) -> None:
        """Removes a deployment that is no longer configured."""
        if _DIRECTORY in os.environ:  # multiprocess files do not support removal
            self.upstream_available.labels(upstream, model).set(math.nan)
        else:
            self.upstream_available.remove(upstream, model)

    @property
    def registry(self) -> CollectorRegistry:
        """The registry, with everything counted so far."""
        self._flush_queue.flush()
        return self._registry

    async def exposition(self) -> bytes:
        """The metrics in Prometheus's text format, of all workers if there are several. Rendered in a thread: with
        hundreds of models in use it takes a quarter of a second."""
        registry = self.registry
        if directory := os.environ.get(_DIRECTORY):
            _recreate(Path(directory))
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return await asyncio.to_thread(generate_latest, registry)
