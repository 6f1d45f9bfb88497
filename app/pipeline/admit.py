"""Refuses before anything is spent: no more requests inside at once than the gateway has room for."""

from __future__ import annotations

from app.errors import Overloaded
from app.metrics import Metrics


class Room:
    """How many requests are inside, over all models: entered before a body is read, as bodies take room too."""

    def __init__(self, capacity: int, metrics: Metrics) -> None:
        self._capacity = capacity
        self._inside = 0
        self._gauge = metrics.tally(metrics.inflight_requests)

    def __enter__(self) -> None:
        """Raises `Overloaded` at once if there is no room."""
        if self._inside >= self._capacity:
            raise Overloaded("the gateway is at its limit of requests in flight", retry_after=1)
        self._inside += 1
        self._gauge.inc()

    def __exit__(self, *exc_info: object) -> None:
        self._inside -= 1
        self._gauge.dec()
