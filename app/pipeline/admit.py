"""Refuses before anything is spent: no more requests, and no more bytes of them and of their answers, than the gateway
has room for."""

from __future__ import annotations

from msgspec import Struct

from app.errors import Overloaded
from app.metrics import Metrics

INPUT = 1024
"""Bytes an input takes while it waits, besides its text."""


class Room:
    """How much is left, over all models. What queues for an upstream is inside: this bounds the queues."""

    def __init__(self, requests: int, size: int, metrics: Metrics) -> None:
        """`size`: bytes of request bodies, and of answers that are not taken yet."""
        self.requests, self.size = requests, size
        self._whole = requests, size
        self.inside = metrics.tally(metrics.inflight_requests)

    def alter(self, other: Room) -> None:
        """Becomes as large as the other is while it is empty; who is inside stays."""
        self.requests += other._whole[0] - self._whole[0]
        self.size += other._whole[1] - self._whole[1]
        self._whole = other._whole


class Place(Struct, eq=False):
    """A request's, from before its body is read until its answer is taken: a context that leaves it in any case."""

    _room: Room
    _held: int = 0
    _inside: bool = False

    def __enter__(self) -> Place:
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
        """Takes room for so many bytes, in all, of the request. Raises `Overloaded` at once if there is none."""
        more = size - self._held
        if more > 0:
            if more > self._room.size:
                raise Overloaded("the gateway is at its limit of bytes in flight", retry_after=1)
            self._room.size -= more
            self._held = size

    def hold_answer(self, size: int) -> None:
        """Takes room for so many bytes in place of the request's, whether there is any or not: what is answered was
        paid for. It is those who come next that are refused."""
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
