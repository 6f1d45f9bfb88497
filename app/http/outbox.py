"""Batches the writes to all connections. Knows neither requests nor the ASGI server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

_LONG = 32 * 2**10
"""Bytes of a body above which passing its pieces on is cheaper than joining them, and writing it at once is cheaper
than waiting for other responses."""


class Outbox:
    """Collects the responses that become ready in one turn of the event loop and writes them together at its end.

    A write wakes its reader, which costs more than the write itself; when responses are written together, their readers
    are already awake and waiting to run. A long response is written at once, while it is still in the processor's
    cache, and is read while the next one is made.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[asyncio.Transport, Sequence[bytes], bool]] = []

    def put(self, transport: asyncio.Transport, head: bytes, body: list[bytes], size: int, *, close: bool) -> None:
        """Queues a response; `close` closes the connection after it. `size`: bytes of the whole body."""
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
