"""Metrics whose series are counted in plain numbers, and passed to prometheus_client later."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import prometheus_client
from prometheus_client import Counter, Gauge
from prometheus_client.metrics import MetricWrapperBase


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
    """A counter."""

    __slots__ = ("_amount", "_child")

    def __init__(self, child: Counter, queue: FlushQueue) -> None:
        super().__init__(queue)
        self._child, self._amount = child, 0.0

    def inc(self, amount: float = 1) -> None:
        self._amount += amount
        if not self.queued:
            self._queue.add(self)

    def flush(self) -> None:
        amount, self._amount = self._amount, 0.0
        if amount:
            self._child.inc(amount)


class BufferedGauge(BufferedSeries):
    """A gauge."""

    __slots__ = ("_child", "_flushed", "_value")

    def __init__(self, child: Gauge, queue: FlushQueue) -> None:
        super().__init__(queue)
        self._child, self._value, self._flushed = child, 0.0, 0.0

    def inc(self, amount: float = 1) -> None:
        self._value += amount
        if not self.queued:
            self._queue.add(self)

    def dec(self, amount: float = 1) -> None:
        self.inc(-amount)

    def set(self, value: float) -> None:
        self._value = value
        if not self.queued:
            self._queue.add(self)

    def flush(self) -> None:
        if self._value != self._flushed:
            self._flushed = self._value
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


M = TypeVar("M", bound=MetricWrapperBase)
S = TypeVar("S", bound=BufferedSeries)


class Family(Generic[S]):
    """A metric: one series for each tuple of label values, or a single one if it has no labels."""

    __slots__ = ("labels",)

    def __init__(self, metric: M, series: Callable[[M, FlushQueue], S], queue: FlushQueue) -> None:
        self.labels: Callable[..., S] = functools.cache(
            lambda *values: series(metric.labels(*values) if values else metric, queue)
        )
        """Returns the series of these label values, always the same object: binding costs more than counting. All are
        kept, as prometheus_client keeps them."""
