"""All of the gateway's metrics.

Label values are bounded: names from the configuration or discovery, our own enumerations, and `other`.
"""

from __future__ import annotations

import asyncio
import math
import os
from pathlib import Path
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from app.metrics.buffered import BufferedCounter, BufferedGauge, BufferedHistogram, Family, FlushQueue, Histogram
from app.metrics.processes import DIRECTORY, recreate

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LAG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_BATCH = (1, 2, 5, 10, 16, 20, 25, 32, 64, 100, 128, 256, 512, 1024, 2048)

# Nobody reads the `_created` series, a second one for each counter with its start time.
disable_created_metrics()  # type: ignore[no-untyped-call]

_PREFIX = "embedding_gateway_"
_Merge = Literal["livesum", "livemin", "livemax"]


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
    """The gateway's metrics. One instance per application, which every configuration in force goes on with;
    two applications in one process share nothing. To be used in the event loop's thread alone."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._flush_queue = queue = FlushQueue(multiprocess=DIRECTORY in os.environ)
        super().__init__(registry)

        def counter(name: str, help_text: str, *labels: str) -> Family[BufferedCounter]:
            return Family(Counter(_PREFIX + name, help_text, labels, registry=registry), BufferedCounter, queue)

        def gauge(name: str, help_text: str, *labels: str, merge: _Merge = "livesum") -> Family[BufferedGauge]:
            metric = Gauge(_PREFIX + name, help_text, labels, registry=registry, multiprocess_mode=merge)
            return Family(metric, BufferedGauge, queue)

        def histogram(name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Family[BufferedHistogram]:
            metric = Histogram(_PREFIX + name, help_text, labels, registry=registry, buckets=buckets)
            return Family(metric, BufferedHistogram, queue)

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
        self._length_changes = counter(
            "upstream_length_changes_total", "Times the vectors changed their length.", "upstream", "model"
        )
        # Not buffered, because its series are removed: see `show_deployment`.
        self._upstream_available = Gauge(
            _PREFIX + "upstream_available",
            "1 while the deployment takes traffic.",
            ["upstream", "model"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.cache_operations = counter(
            "cache_operations_total", "Values read from or written to a tier.", "tier", "operation", "result"
        )
        self.cache_bytes = gauge("cache_bytes", "Bytes a tier holds, in the largest process.", "tier", merge="livemax")
        self.inflight_requests = gauge("inflight_requests", "Requests in flight.").labels()
        self.queued_inputs = gauge("queued_inputs", "Inputs waiting for an upstream slot.", "upstream", "lane")
        self.rejected_requests = counter(
            "rejected_requests_total", "Requests refused, abandoned, or whose answer was not taken.", "reason"
        )
        self.cost = counter("cost_total", "Billed tokens times the price.", "model", "upstream", "currency")
        self.loop_lag = histogram(
            "event_loop_lag_seconds", "How late the event loop came back to a timer: time nobody was served.", _LAG
        ).labels()
        self.log_dropped = counter(
            "log_lines_dropped_total", "Request lines dropped because the log could not be written."
        ).labels()

        if DIRECTORY not in os.environ:
            ProcessCollector(registry=registry)
            PlatformCollector(registry=registry)

    def show_deployment(self, upstream: str, model: str, available: bool) -> None:
        """Records whether a configured deployment takes traffic."""
        self._upstream_available.labels(upstream, model).set(available)

    def count_length_change(self, upstream: str, model: str) -> None:
        """Counts that a deployment's vectors have changed their length. It has no series before that: hardly any ever
        does."""
        self._length_changes.labels(upstream, model).inc()

    def forget_deployment(self, upstream: str, model: str) -> None:
        """Removes a deployment that is no longer configured."""
        if DIRECTORY in os.environ:  # multiprocess files do not support removal
            self._upstream_available.labels(upstream, model).set(math.nan)
        else:
            self._upstream_available.remove(upstream, model)

    @property
    def registry(self) -> CollectorRegistry:
        """The registry, with everything counted so far."""
        self._flush_queue.flush()
        return self._registry

    async def exposition(self) -> bytes:
        """The metrics in Prometheus's text format, of all workers if there are several. Rendered in a thread: with
        hundreds of models in use it takes a quarter of a second."""
        registry = self.registry
        if directory := os.environ.get(DIRECTORY):
            recreate(Path(directory))
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return await asyncio.to_thread(generate_latest, registry)
