"""Refuses before anything is spent: no more requests, and no more bytes of them, than the gateway has room for."""

from __future__ import annotations

from app.errors import Overloaded
from app.metrics import Metrics

INPUT = 1024
"""Bytes an input takes while it waits, besides its text."""


class Room:
    """How much is inside, over all models. What queues for an upstream is inside: this bounds the queues."""

    def __init__(self, requests: int, size: int, metrics: Metrics) -> None:
        """`size`: bytes of request bodies."""
        self._free, self._size = requests, size
        self._gauge = metrics.tally(metrics.inflight_requests)

    def place(self) -> Place:
        """One request's, to be entered before its body is read."""
        return Place(self)

    def enter(self) -> None:
        if self._free <= 0:
            raise Overloaded("the gateway is at its limit of requests in flight", retry_after=1)
        self._free -= 1
        self._gauge.inc()

    def hold(self, size: int) -> None:
        if self._size < size:
            raise Overloaded("the gateway is at its limit of bytes in flight", retry_after=1)
        self._size -= size

    def leave(self, size: int) -> None:
        self._free += 1
        self._size += size
        self._gauge.dec()


class Place:
    """A context for as long as the request is inside."""

    __slots__ = ("_held", "_room")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._held = 0

    def __enter__(self) -> Place:
        """Raises `Overloaded` at once if there is no room."""
        self._room.enter()
        return self

    def hold(self, size: int) -> None:
        """Takes room for so many bytes, in all, of the request. Raises `Overloaded` at once if there is none."""
        if size > self._held:
            self._room.hold(size - self._held)
            self._held = size

    def __exit__(self, *exc_info: object) -> None:
        self._room.leave(self._held)
