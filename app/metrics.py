"""Every metric the gateway has, on a registry handed in. The only import of prometheus_client.

Label values are bounded: names from the configuration or discovery, enumerations of ours, and `other`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
from collections.abc import Iterable
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LAG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_BATCH = (1, 2, 5, 10, 16, 20, 25, 32, 64, 100, 128, 256, 512, 1024, 2048)

CONTENT_TYPE = CONTENT_TYPE_LATEST

# A second series for each counter, saying since when it counts, which nobody asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]

__all__ = ["CONTENT_TYPE", "Counter", "Gauge", "Histogram", "Metrics", "Tally", "forget_process", "share", "unshare"]

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_Merge = Literal["livesum", "livemin", "livemax"]


def share(directory: str) -> None:
    """From now on this process's scrapes tell of all processes that it starts."""
    os.environ[_DIRECTORY] = directory


def unshare() -> None:
    """The end of that."""
    del os.environ[_DIRECTORY]


def forget_process(pid: int) -> None:
    """A process that has ended: what it counted stays, what it held is gone."""
    mark_process_dead(pid)  # type: ignore[no-untyped-call]


class Tally:
    """A series counted in plain numbers, which Prometheus is told at the end of the event loop's turn, or when it
    asks: counting costs a tenth, and what goes up and down again within a turn costs nothing. Not for threads."""

    __slots__ = ("_amount", "_child", "_due", "_waiting")

    def __init__(self, child: Counter | Gauge, due: list[Tally]) -> None:
        """`due`: where all tallies wait that are to be told."""
        self._child, self._due = child, due
        self._amount = 0.0
        self._waiting = False

    def inc(self, amount: float = 1) -> None:
        self._amount += amount
        if not self._waiting:
            self._waiting = True
            if not self._due:
                with contextlib.suppress(RuntimeError):  # no loop: told when asked
                    asyncio.get_running_loop().call_soon(_tell, self._due)
            self._due.append(self)

    def dec(self, amount: float = 1) -> None:
        self.inc(-amount)

    def tell(self) -> None:
        amount, self._amount, self._waiting = self._amount, 0.0, False
        if amount:
            self._child.inc(amount)


def _tell(due: list[Tally]) -> None:
    while due:
        due.pop().tell()


class _Told(Collector):
    """Collected first, so that whoever asks for the metrics is told everything."""

    def __init__(self, due: list[Tally]) -> None:
        self._due = due

    def collect(self) -> Iterable[Metric]:
        _tell(self._due)
        return ()


class Metrics:
    """The gateway's metrics. One instance per gateway; two gateways in one process do not meet."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        self._due: list[Tally] = []
        registry.register(_Told(self._due))
        p = "embedding_gateway_"

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(p + name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str, merge: _Merge = "livesum") -> Gauge:
            return Gauge(p + name, text, labels, registry=registry, multiprocess_mode=merge)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(p + name, text, labels, registry=registry, buckets=buckets)

        self.requests = counter("requests_total", "Embedding requests answered.", "model", "status", "client")
        self.request_duration = histogram(
            "request_duration_seconds", "From first byte in to last byte out.", _LATENCY, "model"
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
        self.rejected_requests = counter("rejected_requests_total", "Requests refused at the door.", "reason")
        self.cost = counter("cost_total", "Billed tokens times the price.", "model", "upstream", "currency")

        self.loop_lag = histogram(
            "event_loop_lag_seconds", "How late the event loop came back to a timer: time nobody was served.", _LAG
        )
        self.log_dropped = counter(
            "log_lines_dropped_total", "Request lines dropped because the log took no more, stuck or on a full disk."
        )
        self.config_valid = gauge(
            "config_valid", "1 while the configuration is the one in force, 0 after a bad one.", merge="livemin"
        )
        self.config_reloads = counter("config_reloads_total", "Times the configuration was read again.", "result")

        if _DIRECTORY not in os.environ:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)

    def tally(self, child: Counter | Gauge) -> Tally:
        """For what is counted with every request."""
        return Tally(child, self._due)

    def forget_deployment(self, upstream: str, model: str) -> None:
        """A deployment that is configured no more."""
        if _DIRECTORY in os.environ:  # where nothing can be removed
            self.upstream_available.labels(upstream, model).set(math.nan)
        else:
            self.upstream_available.remove(upstream, model)

    def exposition(self) -> bytes:
        """Prometheus text. With several workers, of all of them."""
        if _DIRECTORY in os.environ:
            merged = CollectorRegistry()
            MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
            return generate_latest(merged)
        return generate_latest(self.registry)
