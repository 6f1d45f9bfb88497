"""What is written over connections, by all of them together. Knows neither requests nor the ASGI server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

_LONG = 32 * 2**10
"""Bytes of a body from which handing its pieces over is cheaper than joining them, and a write of its own cheaper than
waiting for others."""


class Outbox:
    """Responses that become ready in one turn of the event loop, written together at its end.

    A write wakes its reader, which costs more than the write; readers that wait for one another's turn are awake. A
    long one goes at once, while the processor still has it at hand, and is read while the next is made.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, Sequence[bytes], bool]] = []

    def put(self, transport: asyncio.Transport, head: bytes, body: list[bytes], size: int, *, close: bool) -> None:
        """To be written soon; `close` ends the connection after it. The body comes in pieces of `size` together."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.flush)
        if size < _LONG:
            self._waiting.append((transport, (b"".join((head, *body)),), close))
        else:
            self._waiting.append((transport, (head, *body), close))
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for transport, pieces, close in waiting:
            if transport.is_closing():
                continue
            transport.writelines(pieces)
            if close:
                transport.close()
