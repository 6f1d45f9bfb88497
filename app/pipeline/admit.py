"""Refuses before anything is spent: no more requests, and no more bytes of them and of their answers, than the gateway
has room for."""

from __future__ import annotations

from msgspec import Struct

from app.errors import Overloaded
from app.metrics import Metrics

INPUT_OVERHEAD = 1024
"""Bytes an input takes while it waits, besides its text."""


class Capacity:
    """How much room is left, over all models. It bounds the queues too: what queues for an upstream counts as
    inside."""

    def __init__(self, requests: int, size: int, metrics: Metrics) -> None:
        """`size`: bytes of request bodies, and of answers that are not taken yet."""
        self.requests, self.size = requests, size
        self._whole = requests, size
        self.inside = metrics.buffered_counter(metrics.inflight_requests)

    def alter(self, other: Capacity) -> None:
        """Becomes as large as the other one is when empty; requests inside stay."""
        self.requests += other._whole[0] - self._whole[0]
        self.size += other._whole[1] - self._whole[1]
        self._whole = other._whole


class Admission(Struct, eq=False):
    """A request's place in the room, from before its body is read until its answer is taken. A context, so that it is
    left in any case."""

    _room: Capacity
    _held: int = 0
    _inside: bool = False

    def __enter__(self) -> Admission:
        return self

    def enter(self) -> None:
        """Raises `Overloaded` at once if there is no room."""
        room = self._room
        if room.requests <= 0:
            raise Overloaded("the gateway is at its limit of requests in flight", retry_after=1)
        room.requests -= 1
        room.inside.inc()
        self._inside = True

    def hold(self, size: int) -> None:
        """Takes room for `size` bytes of the request in all. Raises `Overloaded` at once if there is none."""
        more = size - self._held
        if more > 0:
            if more > self._room.size:
                raise Overloaded("the gateway is at its limit of bytes in flight", retry_after=1)
            self._room.size -= more
            self._held = size

    def hold_answer(self, size: int) -> None:
        """Takes room for `size` bytes of the answer in place of the request's, whether there is any or not: the answer
        is paid for. Requests that come next are refused instead."""
        self._room.size += self._held - size
        self._held = size

    def leave(self) -> None:
        """Gives back what was taken, once."""
        if self._inside:
            room = self._room
            room.requests += 1
            room.size += self._held
            room.inside.dec()
            self._inside = False

    def __exit__(self, *exc_info: object) -> None:
        self.leave()
