"""A tier's counters."""

from __future__ import annotations

from app.metrics import BufferedCounter, Metrics


class Counts:
    """The `cache_operations_total` series of one tier. Each counts values, not calls."""

    def __init__(self, metrics: Metrics, tier: str) -> None:
        def bound(operation: str, result: str) -> BufferedCounter:
            return metrics.cache_operations.labels(tier, operation, result)

        self.hit = bound("get", "hit")
        self.miss = bound("get", "miss")
        self.get_error = bound("get", "error")
        self.get_timeout = bound("get", "timeout")
        self.get_corrupt = bound("get", "corrupt")
        self.get_skipped = bound("get", "skipped")
        self.ok = bound("set", "ok")
        self.set_error = bound("set", "error")
        self.set_timeout = bound("set", "timeout")
        self.set_skipped = bound("set", "skipped")
        self.set_dropped = bound("set", "dropped")
