"""Writes to all connections, done together. Knows neither requests nor the ASGI server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

_LONG = 32 * 2**10
"""Bytes of a body from which on it is cheaper to hand over its pieces than to join them, and to write at once than to
wait for other responses."""


class Outbox:
    """Responses that become ready in one turn of the event loop, written together at its end.

    A write wakes its reader, which costs more than the write itself; readers of responses that are written together are
    awake already, waiting for their turn. A long response goes at once, while it is still in the processor's cache, and
    is read while the next one is made.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, Sequence[bytes], bool]] = []

    def put(self, transport: asyncio.Transport, head: bytes, body: list[bytes], size: int, *, close: bool) -> None:
        """To be written soon; `close` ends the connection after it. `size`: bytes of all pieces of the body."""
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
