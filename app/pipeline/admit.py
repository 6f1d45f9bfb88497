"""Admission: refuses a request before any work is done, once the gateway is at its limit of requests, or of bytes of
requests and responses, in flight."""

from __future__ import annotations

from msgspec import Struct

from app.errors import Overloaded
from app.metrics import Metrics

INPUT_OVERHEAD = 1024
"""Bytes of memory that a waiting input takes besides its text."""


class Capacity:
    """The gateway's remaining capacity, over all models. It bounds the queues too: a request queued for an upstream is
    in flight."""

    def __init__(self, requests: int, size: int, metrics: Metrics) -> None:
        """`size`: bytes of request bodies, and of responses that the client has not yet taken."""
        self.requests, self.size = requests, size
        self._total = requests, size
        self.in_flight = metrics.inflight_requests

    def alter(self, other: Capacity) -> None:
        """Takes on the total capacity of `other`; requests in flight still count."""
        self.requests += other._total[0] - self._total[0]
        self.size += other._total[1] - self._total[1]
        self._total = other._total


class Admission(Struct, eq=False):
    """One request's part of the capacity, from before its body is read until its response is taken. A context manager,
    so that it is always given back."""

    _capacity: Capacity
    _held: int = 0
    _has_place: bool = False

    def __enter__(self) -> Admission:
        return self

    def take_place(self) -> None:
        """Raises `Overloaded` immediately if there is no capacity."""
        capacity = self._capacity
        if capacity.requests <= 0:
            raise Overloaded("the gateway is at its limit of requests in flight", retry_after=1)
        capacity.requests -= 1
        capacity.in_flight.inc()
        self._has_place = True

    def hold(self, size: int) -> None:
        """Reserves `size` bytes for the request in total. Raises `Overloaded` immediately if there are not enough."""
        more = size - self._held
        if more > 0:
            if more > self._capacity.size:
                raise Overloaded("the gateway is at its limit of bytes in flight", retry_after=1)
            self._capacity.size -= more
            self._held = size

    def hold_answer(self, size: int) -> None:
        """Reserves `size` bytes for the response in place of the request's, even if there are not enough: the response
        is paid for. The next requests are refused instead."""
        self._capacity.size += self._held - size
        self._held = size

    def end(self) -> None:
        """Gives back what was taken. Idempotent."""
        if self._has_place:
            capacity = self._capacity
            capacity.requests += 1
            capacity.size += self._held
            capacity.in_flight.dec()
            self._has_place = False

    def __exit__(self, *exc_info: object) -> None:
        self.end()
