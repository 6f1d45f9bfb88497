"""A tier's counters, bound to their labels once: binding a label set costs more than counting."""

from __future__ import annotations

from app.metrics import Counter, Metrics


class Counts:
    """The `cache_operations_total` series of one tier. Each counts values, not calls."""

    def __init__(self, metrics: Metrics, tier: str) -> None:
        def bound(operation: str, result: str) -> Counter:
            return metrics.cache_operations.labels(tier, operation, result)

        self.hit = metrics.buffered_counter(bound("get", "hit"))
        self.miss = metrics.buffered_counter(bound("get", "miss"))
        self.get_error = bound("get", "error")
        self.get_timeout = bound("get", "timeout")
        self.get_corrupt = bound("get", "corrupt")
        self.get_skipped = bound("get", "skipped")
        self.ok = metrics.buffered_counter(bound("set", "ok"))
        self.set_error = bound("set", "error")
        self.set_timeout = bound("set", "timeout")
        self.set_skipped = bound("set", "skipped")
        self.set_dropped = bound("set", "dropped")
