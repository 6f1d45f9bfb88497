"""Every metric the gateway has. The only import of prometheus_client.

Label values are bounded: names from the configuration or discovery, enumerations of ours, and `other`.
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

# A second series for each counter, saying since when it counts, which nobody asks for.
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
"""Says what a process calls its files there, to go on with those of the one before: else each leaves some for good."""
_FIRST_SIZE = 2**16
"""Bytes of a file of metrics; it is doubled when it is full."""
_ENTRY = 40
"""Bytes that a series takes there beside its name, at most."""
_Merge = Literal["livesum", "livemin", "livemax"]

_once = functools.lru_cache(maxsize=4096)
"""Remembers what was made for each tuple of label values, up to so many."""


@contextlib.contextmanager
def multiprocess(directory: str) -> Iterator[None]:
    """As long as the block runs, this process's scrapes tell of all processes that it starts, and of what it counts
    itself from here on, over files in this directory."""
    os.environ[_DIRECTORY] = directory
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        del os.environ[_DIRECTORY]
        values.ValueClass = values.MutexValue


def forget_process(name: str) -> None:
    """It has ended: what it counted stays, what it held is gone."""
    mark_process_dead(name)  # type: ignore[no-untyped-call]


class _File(MmapedDict):
    """What a process counts of one type, in a file that the others read. The file is mapped, and to write to a map
    that the disk has no room for is a process's end (SIGBUS): so its blocks are there before they are written to,
    and series that there is no room for are not counted."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._capacity, self._positions = 0, {}

    def read_value(self, key: str) -> tuple[float, float]:
        """Asked once for each series, before it is written."""
        try:
            if not self._capacity:
                self._open()
            if self._used + len(key.encode()) + _ENTRY > self._capacity:
                with self._path.open("ab") as file:
                    file.write(bytes(self._capacity))
            return super().read_value(key)  # type: ignore[no-any-return, no-untyped-call]
        except OSError as error:
            _say_left_out(self._path.parent, error.strerror)
            return 0.0, 0.0

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        if key in self._positions:
            super().write_value(key, value, timestamp)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        if self._capacity:
            super().close()  # type: ignore[no-untyped-call]

    def _open(self) -> None:
        if not self._path.exists():
            whole = self._path.with_suffix(".new")  # which nobody reads
            try:
                whole.write_bytes(bytes(_FIRST_SIZE))
                whole.rename(self._path)
            finally:
                whole.unlink(missing_ok=True)
        super().__init__(str(self._path))  # type: ignore[no-untyped-call]


@functools.cache
def _say_left_out(directory: Path, trouble: str) -> None:
    """Once a process."""
    log.error("metrics of this process are incomplete: %s: %s", directory, trouble)


def _make_anew(directory: Path) -> None:
    """Where somebody has tidied up. What is counted by those who begin after that is seen again."""
    if not directory.is_dir():
        _say_left_out(directory, "it was removed; workers that had begun before count unseen")
        directory.mkdir(0o700, parents=True, exist_ok=True)


values.MmapedDict = _File  # type: ignore[attr-defined, assignment]
if (_name := os.environ.get(PROCESS_NAME)) and _DIRECTORY in os.environ:
    values.ValueClass = values.MultiProcessValue(lambda: _name)  # type: ignore[no-untyped-call]


class Histogram(prometheus_client.Histogram):
    """One that can be told of many observations at once."""

    def add(self, counts: Sequence[int], total: float) -> None:
        """`counts`: how many there were in each bucket; `total`: their sum."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)

    @property
    def bounds(self) -> Sequence[float]:
        """The upper end of each bucket."""
        return self._upper_bounds


class BufferedSeries:
    """A series that is counted in plain numbers, which Prometheus is told later: counting costs a tenth of that, and
    what goes up and down again meanwhile costs nothing. Not for threads."""

    __slots__ = ("_due", "waiting")

    def __init__(self, due: FlushQueue) -> None:
        self._due = due
        self.waiting = False
        """Whether it is among those that are due."""

    def flush(self) -> None:
        """Everything counted since the last time."""
        raise NotImplementedError


class BufferedCounter(BufferedSeries):
    """A counter, or a gauge that goes up and down."""

    __slots__ = ("_amount", "_child")

    def __init__(self, child: Counter | Gauge, due: FlushQueue) -> None:
        super().__init__(due)
        self._child, self._amount = child, 0.0

    def inc(self, amount: float = 1) -> None:
        self._amount += amount
        if not self.waiting:
            self._due.add(self)

    def dec(self, amount: float = 1) -> None:
        self.inc(-amount)

    def flush(self) -> None:
        amount, self._amount = self._amount, 0.0
        if amount:
            self._child.inc(amount)


class BufferedGauge(BufferedSeries):
    """A gauge that is set."""

    __slots__ = ("_child", "_value")

    def __init__(self, child: Gauge, due: FlushQueue) -> None:
        super().__init__(due)
        self._child, self._value = child, 0.0

    def set(self, value: float) -> None:
        self._value = value
        if not self.waiting:
            self._due.add(self)

    def flush(self) -> None:
        self._child.set(self._value)


class BufferedHistogram(BufferedSeries):
    """A histogram."""

    __slots__ = ("_bounds", "_child", "_counts", "_total")

    def __init__(self, child: Histogram, due: FlushQueue) -> None:
        super().__init__(due)
        self._child, self._bounds = child, child.bounds
        self._counts, self._total = [0] * len(self._bounds), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value
        if not self.waiting:
            self._due.add(self)

    def flush(self) -> None:
        self._child.add(self._counts, self._total)
        self._counts, self._total = [0] * len(self._bounds), 0.0


class FlushQueue:
    """The series that have counted something Prometheus is yet to be told. It is told before this process's metrics are
    read; where another process may read them (several workers share theirs), at the end of the event loop's turn."""

    def __init__(self, *, multiprocess: bool) -> None:
        self._shared = multiprocess
        self._waiting: list[BufferedSeries] = []
        self._planned = False

    def add(self, series: BufferedSeries) -> None:
        series.waiting = True
        self._waiting.append(series)
        if self._shared and not self._planned:
            with contextlib.suppress(RuntimeError):  # no loop yet: told with the next, or when asked
                asyncio.get_running_loop().call_soon(self.flush)
                self._planned = True

    def flush(self) -> None:
        self._planned = False
        waiting, self._waiting = self._waiting, []
        for series in waiting:
            series.waiting = False
            series.flush()


class ConfigMetrics:
    """Whether the configuration is in force. Of several processes, the one that reads it has these, too."""

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
        """It was read again, and is now in force or cannot be."""
        self.config_valid.set(valid)
        self.config_reloads.labels("ok" if valid else "failed").inc()


class Metrics(ConfigMetrics):
    """The gateway's metrics. One instance per gateway; two gateways in one process do not meet."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._due = FlushQueue(multiprocess=_DIRECTORY in os.environ)
        super().__init__(registry)
        p = _PREFIX

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(p + name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str, merge: _Merge = "livesum") -> Gauge:
            return Gauge(p + name, text, labels, registry=registry, multiprocess_mode=merge)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(p + name, text, labels, registry=registry, buckets=buckets)

        self.requests = counter("requests_total", "Embedding requests answered.", "model", "status", "client")
        self.request_duration = histogram(
            "request_duration_seconds", "From first byte in until the answer is ready to be sent.", _LATENCY, "model"
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
        self.upstream_retries = counter("upstream_retries_total", "Calls made again.", "upstream", "reason")
        self.upstream_available = gauge(
            "upstream_available", "1 while the deployment takes traffic.", "upstream", "model", merge="livemax"
        )
        self.cache_operations = counter(
            "cache_operations_total", "Values asked of or given to a tier.", "tier", "operation", "result"
        )
        self.cache_bytes = gauge("cache_bytes", "Bytes a tier holds, in the largest process.", "tier", merge="livemax")
        self.inflight_requests = gauge("inflight_requests", "Requests inside.")
        self.queued_inputs = gauge("queued_inputs", "Inputs waiting for an upstream slot.", "upstream", "lane")
        self.rejected_requests = counter(
            "rejected_requests_total", "Requests refused, given up or not taken.", "reason"
        )
        self.cost = counter("cost_total", "Billed tokens times the price.", "model", "upstream", "currency")
        self.loop_lag = histogram(
            "event_loop_lag_seconds", "How late the event loop came back to a timer: time nobody was served.", _LAG
        )
        self.log_dropped = counter(
            "log_lines_dropped_total", "Request lines dropped because the log took no more, stuck or on a full disk."
        )

        if _DIRECTORY not in os.environ:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)

    def buffered_counter(self, child: Counter | Gauge) -> BufferedCounter:
        """For what is counted with every request."""
        return BufferedCounter(child, self._due)

    def buffered_counters(self, counter: Counter) -> Callable[..., BufferedCounter]:
        """`buffered_counter` by label values, each bound to its series once: that costs more than counting."""
        return _once(lambda *labels: self.buffered_counter(counter.labels(*labels)))

    def buffered_gauge(self, child: Gauge) -> BufferedGauge:
        """For what is set with every request."""
        return BufferedGauge(child, self._due)

    def buffered_histogram(self, child: Histogram) -> BufferedHistogram:
        """For what is observed with every request."""
        return BufferedHistogram(child, self._due)

    def buffered_histograms(self, histogram: Histogram) -> Callable[..., BufferedHistogram]:
        """`buffered_histogram` by label values, as `buffered_counters`."""
        return _once(lambda *labels: self.buffered_histogram(histogram.labels(*labels)))

    def show_deployment(self, upstream: str, model: str, available: bool) -> None:
        """One that is configured, and whether it takes traffic."""
        self.upstream_available.labels(upstream, model).set(available)

    def forget_deployment(self, upstream: str, model: str) -> None:
        """A deployment that is configured no more."""
        if _DIRECTORY in os.environ:  # where nothing can be removed
            self.upstream_available.labels(upstream, model).set(math.nan)
        else:
            self.upstream_available.remove(upstream, model)

    @property
    def registry(self) -> CollectorRegistry:
        """Its series, told of everything up to now."""
        self._due.flush()
        return self._registry

    async def exposition(self) -> bytes:
        """Prometheus text. With several workers, of all of them. Of hundreds of models in use it takes a quarter of a
        second, in a thread."""
        registry = self.registry
        if directory := os.environ.get(_DIRECTORY):
            _make_anew(Path(directory))
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return await asyncio.to_thread(generate_latest, registry)
